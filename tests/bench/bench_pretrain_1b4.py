"""The seed's compact GPT-OSS (1.49 B) trained from scratch: memory, tokens/s, MFU, and its 500 sentences.

    python tests/bench/bench_pretrain_1b4.py speed                    one GPU: optimizers and checkpointing
    python tests/bench/bench_pretrain_1b4.py two                      two GPUs: DDP and FSDP2 beside one
    python tests/bench/bench_pretrain_1b4.py sentences FOLDER SEVEN   the shipped 500 sentences; the seed's seven
    python tests/bench/bench_pretrain_1b4.py generate FOLDER          `tatara generate` of what 100 steps of them taught
    python tests/bench/bench_pretrain_1b4.py corpus FOLDER SEVEN      make both corpora (where Tatara is installed)

The product's own worker, run as the flow runs it; one JSON line a case, the table last. Needs torch, transformers,
tokenizers, for 8-bit moments bitsandbytes.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
HERE = Path(os.environ.get("BENCH_FOLDER", "/tmp/bench_pretrain"))
ROW_TOKENS, NUM_STEPS, NUM_WARM = 4096, 24, 8
SPEED: dict[str, dict[str, Any]] = {
    "adamw_8bit, 2 rows": {"rows_per_step": 2},
    "adamw_8bit, 2 rows, no masters": {"rows_per_step": 2, "masters": False},
    "adamw_8bit, 2 rows, selective": {"rows_per_step": 2, "checkpointing": "selective"},
    "adamw_8bit, 3 rows": {"rows_per_step": 3},
    "adamw, 8 rows": {"rows_per_step": 8, "optimizer": "adamw"},
    "adamw, 16 rows": {"rows_per_step": 16, "optimizer": "adamw"},
    "adamw, 16 rows, no masters": {"rows_per_step": 16, "optimizer": "adamw", "masters": False},
    "stock kernels, adamw, 8 rows": {"rows_per_step": 8, "optimizer": "adamw", "kernels": "stock"},
}
TWO: dict[str, dict[str, Any]] = {
    "2 GPUs, DDP": {"rows_per_step": 32, "optimizer": "adamw", "num_processes": 2},
    "2 GPUs, FSDP2": {"rows_per_step": 32, "optimizer": "adamw", "num_processes": 2, "parallel": "fsdp2"},
    "1 GPU": {"rows_per_step": 16, "optimizer": "adamw"},
}
SENTENCES: dict[str, dict[str, Any]] = {
    "50 a step (the recipe)": {},
    "25 a step": {"rows_per_step": 25, "num_steps": 150},
    "5 a step, 300 steps, as the seed": {"rows_per_step": 5, "num_steps": 300},
    "50 a step, rate 2e-5": {"learning_rate": 2e-5},
    "50 a step, rate 2e-5, no masters": {"learning_rate": 2e-5, "masters": False},
}
WITHOUT_MASTERS = """
import runpy
from transformers import Trainer
from tasks.pretrain.trainer import MasterTrainer
MasterTrainer.create_optimizer = Trainer.create_optimizer
runpy.run_module("tasks.pretrain.worker", run_name="__main__", alter_sys=True)
"""  # what the masters cost and bring is seen beside a worker that has none
SEVEN: dict[str, dict[str, Any]] = {"the seed's 7 sentences, 5 a step": {"rows_per_step": 5, "num_steps": 150}}


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compact_spec(changes: dict[str, Any]) -> dict[str, Any]:
    """Return recipe compact_1b4 with changes."""
    from flows.recipes import resolve_pretrain

    return resolve_pretrain("compact_1b4", changes).model_dump(mode="json")


def make_sentences(folder: Path, seven: Path) -> None:
    """Prepare the shipped sentences as the flow does, and the seed's own seven repeated to 500; copy both corpora."""
    from huggingface_hub import HfApi

    from tasks.artifacts import ArtifactStore
    from tasks.corpus.run import prepare_corpus
    from tasks.specs import PretrainSpec

    HERE.mkdir(parents=True, exist_ok=True)
    shipped = (ROOT / "data" / "short_english" / "sentences.txt").read_text().splitlines()
    repeated = HERE / "seven.txt"
    repeated.write_text("".join(shipped[number % 7] + "\n" for number in range(500)))
    for target, corpus in ((folder, "short_english"), (seven, str(repeated))):
        spec = PretrainSpec.model_validate(compact_spec({"corpus": corpus}))
        made = prepare_corpus(spec, ArtifactStore(HERE / "home"), HfApi(token=False))
        shutil.copytree(made.folder, target, dirs_exist_ok=True)


def random_corpus(folder: Path) -> Path:
    """Write 4 M ids whose frequencies fall as those of words do; speed does not depend on what they say."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer").exists():
        folder.mkdir(parents=True, exist_ok=True)
        ids = 2 + np.minimum(np.random.default_rng(0).zipf(1.2, 4_000_000), 31_997)  # 0 to 2 are special tokens
        ids.astype("<u2").tofile(folder / "tokens.bin")
        np.asarray([len(ids)]).astype("<i8").tofile(folder / "document_ends.bin")
        words = {"<eos>": 0, "<pad>": 1, "<bos>": 2}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
        )
        fast.save_pretrained(folder / "tokenizer")
    return folder


def start(name: str, corpus: Path, changes: dict[str, Any]) -> tuple[Path, subprocess.Popen[bytes]]:
    """Start the worker on one case."""
    has_masters = changes.get("masters", True)
    changes = {name: value for name, value in changes.items() if name != "masters"}
    folder = HERE / "".join(letter if letter.isalnum() else "_" for letter in name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = compact_spec({"log_steps": 1, "save_steps": 100_000, **changes})
    job = {"folder": str(folder), "spec": spec, "corpus_folder": str(corpus), "corpus": {"dtype": "uint16"}}
    (folder / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.pretrain.worker", str(folder / "job.json")]
    if not has_masters:
        argv = [sys.executable, "-c", WITHOUT_MASTERS, str(folder / "job.json")]
    if spec["num_processes"] > 1:
        argv[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec['num_processes']}"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    seen = ",".join(map(str, range(spec["num_processes"])))
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "CUDA_VISIBLE_DEVICES": seen,
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    return folder, subprocess.Popen(argv, env=env, stdout=(folder / "output.log").open("wb"), stderr=subprocess.STDOUT)


def finish(folder: Path, process: subprocess.Popen[bytes], *, keep_model: bool = False) -> list[dict[str, Any]]:
    """Wait for a case; return its records, and leave nothing large behind but the model where it is wanted."""
    status = process.wait()
    if status:
        say((folder / "output.log").read_text()[-2500:])
        return []
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["memory"] = json.loads((folder / "result.json").read_text())["memory"]
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not keep_model:
        shutil.rmtree(folder / "model", ignore_errors=True)
    return records


def measure_speed(cases: dict[str, dict[str, Any]]) -> None:
    """Run each case by itself; tokens/s and MFU are medians after warm-up, peaks those of the whole run."""
    corpus = random_corpus(HERE / "random")
    for name, changes in cases.items():
        told = {"rows": "windows", "row_tokens": ROW_TOKENS, "num_steps": NUM_STEPS, "learning_rate": 1e-4, **changes}
        begun = time.monotonic()
        records = finish(*start(name, corpus, told))
        if records:
            warm = records[NUM_WARM:]
            result = {
                "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in warm)),
                "mfu_pct": round(statistics.median(record["mfu_pct"] for record in warm), 1),
                "peak_gb": round(records[-1]["peak_gpu_bytes"] / 1e9, 2),
                "held_gb": {part: round(size / 1e9, 2) for part, size in records[-1]["memory"].items()},
                "first_loss": round(records[0]["loss"], 3),
                "last_loss": round(records[-1]["loss"], 3),
                "seconds_in_all": round(time.monotonic() - begun),
                "changes": changes,
            }
            keep("speed", name, result)


def learn_sentences(cases: dict[str, dict[str, Any]], corpus: Path) -> None:
    """Run each case by itself."""
    for name, changes in cases.items():
        records = finish(*start(name, corpus, changes))
        if records:
            losses = [record["loss"] for record in records]
            gaps = [after["time"] - before["time"] for before, after in pairwise(records)]
            ends = [statistics.mean(losses[at - 10 : at]) for at in range(10, len(losses) + 1, 10)]
            result = {
                "loss_by_10_steps": [round(loss, 3) for loss in ends],
                "first_step_at_2.93": next((step for step, loss in enumerate(losses, 1) if loss <= 2.93), None),
                "last_loss": round(losses[-1], 3),
                "accuracy": round(records[-1]["accuracy"], 3),
                "peak_gb": round(records[-1]["peak_gpu_bytes"] / 1e9, 2),
                "tokens": records[-1]["tokens"],
                "ms_per_step": round(1000 * statistics.median(gaps)),
                "changes": changes,
            }
            keep("sentences", name, result)


def generate(corpus: Path) -> None:
    """Train as the recipe says, then ask the model for the sentences' ends, on the GPU and on the CPU."""
    name = "to generate from"
    folder, process = start(name, corpus, {})
    records = finish(folder, process, keep_model=True)
    if not records:
        return
    keep("generate", "training", {"last_loss": round(records[-1]["loss"], 3), "steps": len(records)})
    for device in ("cuda", "cpu"):
        for prompt in ("The quick brown", "Machine learning", "Neural networks can"):
            argv = [sys.executable, "-m", "deployments.cli", "generate", "--model", str(folder / "model")]
            argv += ["--prompt", prompt, "--max-tokens", "48", "--device", device, "--dtype", "bfloat16"]
            env = {**os.environ, "HF_HUB_OFFLINE": "1"}
            ran = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
            told = (ran.stderr.strip().splitlines() or [""])[-1]
            keep("generate", f"{device}: {prompt}", {"exit": ran.returncode, "text": ran.stdout.strip(), "told": told})


def keep(what: str, name: str, result: dict[str, Any]) -> None:
    """Say a result, and with BENCH_OUT add it to that file at once."""
    say(json.dumps({name: {key: value for key, value in result.items() if key != "changes"}}))
    if os.environ.get("BENCH_OUT"):
        import torch

        path = Path(os.environ["BENCH_OUT"])
        told = json.loads(path.read_text()) if path.exists() else {}
        told |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        told.setdefault(what, {})[name] = result
        path.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    """Run one part."""
    what = sys.argv[1] if len(sys.argv) > 1 else "speed"
    if what == "corpus":
        make_sentences(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    import torch

    if not torch.cuda.is_available():
        say(json.dumps({"bench_pretrain_1b4": "skipped: needs a CUDA device"}))
        return
    if what == "sentences":
        learn_sentences({name: SENTENCES[name] for name in sys.argv[4:] or SENTENCES}, Path(sys.argv[2]))
        learn_sentences({} if sys.argv[4:] else SEVEN, Path(sys.argv[3]))
    elif what == "generate":
        generate(Path(sys.argv[2]))
    else:
        cases = TWO if what == "two" else SPEED
        measure_speed({name: cases[name] for name in sys.argv[2:] or cases})


if __name__ == "__main__":
    main()
