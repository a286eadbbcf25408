"""Rollouts by transformers in gpt-oss-20b's shapes, one process, one GPU: `generate` beside continuous batching.

    python tests/bench/bench_rollouts_20b.py [ENGINE ...]     a JSON line each; rollouts_20b.json in $BENCH_OUT or $OUT

The model is loaded once, as the worker does it, with a random adapter on attention and all experts that says something;
then 32 questions are answered by each engine in turn, and the adapter becomes another one, in place, between them.
The first rollout compiles, and the first `continuous` in a row makes its cache and graphs: name an engine three times.

    transformers      `generate`
    continuous        what the worker takes: kept from rollout to rollout, steps that decode as CUDA graphs
    continuous-anew   the same, made anew for each rollout
    continuous-eager  kept, without graphs

reserved_gpu_gb: behind the rollout; beyond that of `transformers` it is what the engine keeps. Needs what
bench_grpo_20b.py needs. BENCH_DIR: as there; BENCH_TOKENS: of each completion. BENCH_BASE: 20b (default), or 7b, the
shapes of Qwen2.5-7B with an adapter on its attention that is zero; BENCH_QUANTIZATION: of that, `nf4` say.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import bench_grpo_20b  # noqa: E402
from tests.bench.bench_train_20b import EXPERTS  # noqa: E402
from tests.bench.worker_case import in_child  # noqa: E402

ENGINES = ("transformers", "continuous", "continuous-anew", "continuous-eager")


def make_trainer(work: Path, num_tokens: int) -> Any:  # Any: a GroupTrainer
    """Return the worker's trainer, ready to generate."""
    from tasks.reinforce import worker
    from tasks.specs import ReinforceSpec

    is_dense = base_name() == "7b"
    wanted = bench_grpo_20b.case(
        128,
        num_tokens,
        parameters=[] if is_dense else EXPERTS,
        rows_per_device=4,
        start=not is_dense,
        rollouts="continuous",
        quantization=os.environ.get("BENCH_QUANTIZATION", "none"),
    )
    run = Path(tempfile.mkdtemp(prefix="rollouts-", dir=work))
    job = bench_grpo_20b.make_job(wanted, work, run)
    trainer = worker.make_trainer(job, ReinforceSpec.model_validate(job["spec"]))
    trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def base_name() -> str:
    """Return 20b or 7b."""
    return os.environ.get("BENCH_BASE", "20b")


def choose_engine(trainer: Any, name: str) -> None:  # Any: as above
    """Have the trainer generate by that engine; one that is there and is not to be made anew goes on."""
    from tasks.reinforce.continuous import ContinuousEngine

    told, kept = trainer.wanted, trainer.wanted.continuous
    if kept and name == told.engine != "continuous-anew":
        return
    if kept:
        kept.drop()
    lengths = [len(prompt.ids) for prompt in told.prompts]
    has_graphs = name != "continuous-eager"
    told.continuous = None if name == "transformers" else ContinuousEngine(lengths, has_graphs=has_graphs)
    told.engine = name


def learn(trainer: Any) -> None:  # Any: as above
    """Make another adapter of it, in place and as large: an engine that replays the older one shows nothing of it."""
    import torch

    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(weight[torch.randperm(len(weight), device=weight.device)])


def measure(trainer: Any, engine: str) -> dict[str, Any]:  # Any: as above; JSON values
    """Let one engine answer the first 32 questions; return what that took, and what it shows of the adapter."""
    import torch

    from tasks.training import fix_seeds

    choose_engine(trainer, engine)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    fix_seeds(0)
    learn(trainer)
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    if on_gpu:
        torch.cuda.empty_cache()
    done, found = trainer.rollout, trainer.rollout.agreement
    return {
        "base": base_name(),
        "quantization": os.environ.get("BENCH_QUANTIZATION", "none"),
        "engine": engine,
        "rollout_s": round(done.generate_s, 2),
        "tokens_per_s": round(done.num_generated / done.generate_s, 1),
        "adapter_share": found.share and round(found.share, 3),
        "adapter_share_error": round(found.share_error, 4),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "reserved_gpu_gb": round(torch.cuda.memory_reserved() / 1e9, 2) if on_gpu else None,
        "num_graphs": num_graphs(trainer),
    }


def num_graphs(trainer: Any) -> int:  # Any: as above
    """Return how many CUDA graphs are kept."""
    manager = trainer.wanted.continuous and trainer.wanted.continuous._manager
    return len(manager.batch_processor.inputs_and_outputs.graphs._storage) if manager else 0


def main() -> None:
    """Make the base, load it, measure; report after each."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "rollouts-gptoss20b", "skipped": "no CUDA device"}\n')
        return
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the product starts its worker
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = Path(os.environ.get("BENCH_DIR") or tempfile.mkdtemp(prefix="bench-grpo-"))
    work.mkdir(parents=True, exist_ok=True)
    if base_name() == "20b":
        bench_grpo_20b.need_base(work)
    elif not (work / "base" / "config.json").exists():
        in_child("bench_qlora_7b", work / "base")
    engines = sys.argv[1:] or [name for name in ENGINES for _ in range(3)]
    trainer = make_trainer(work, int(os.environ.get("BENCH_TOKENS", "128")))
    report: list[dict[str, Any]] = []  # Any: JSON values
    for engine in engines:
        report.append(measure(trainer, engine))
        sys.stdout.write(json.dumps(report[-1]) + "\n")
        sys.stdout.flush()
        out = Path(os.environ.get("BENCH_OUT") or os.environ.get("OUT") or work)
        (out / "rollouts_20b.json").write_text(json.dumps(report, indent=1) + "\n")
    if trainer.wanted.continuous:
        trainer.wanted.continuous.drop()  # while Python still has what its end needs


if __name__ == "__main__":
    main()
