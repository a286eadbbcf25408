"""Small pretrainings by the real worker: a corpus artifact's files made by hand, and runs on them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tasks.specs import PretrainSpec, change
from tests.tiny import SHAPE, byte_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SPEC = PretrainSpec(
    shape=SHAPE.model_copy(
        update={"num_layers": 2, "context_tokens": 64, "initial_context_tokens": 64, "rope_factor": 1.0}
    ),
    rows="documents",
    row_tokens=48,
    rows_per_step=4,
    num_steps=6,
    save_steps=2,
    log_steps=1,
    warmup_steps=1,
    learning_rate=5e-3,
    router_aux_loss_coef=0.01,
    tokenizer="train",
)
WORDS = ("iron", "sand", "fire", "blade", "smith", "steel", "water", "clay", "stone", "wind")


def write_corpus(folder: Path, num_documents: int = 18) -> Path:
    """Write tokens.bin, document_ends.bin and tokenizer/ as the corpus step does; no whole number of steps."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    documents = []
    for number in range(num_documents):
        words = [WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(2 + number % 9)]
        documents.append([*tokenizer(" ".join(words))["input_ids"], tokenizer.eos_token_id])
    np.concatenate(documents).astype("<u2").tofile(folder / "tokens.bin")
    np.cumsum([len(ids) for ids in documents]).astype("<i8").tofile(folder / "document_ends.bin")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def start(corpus: Path, folder: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """Start the worker, under torchrun for several processes."""
    spec = change(SPEC, changes)
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "folder": str(folder),
        "spec": spec.model_dump(mode="json"),
        "corpus_folder": str(corpus),
        "corpus": {"dtype": "uint16"},
    }
    (folder / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.pretrain.worker", str(folder / "job.json")]
    if spec.num_processes > 1:
        argv[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec.num_processes}"]
    log = (folder / "output.log").open("ab")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)


def run(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run the worker to its end; return its result."""
    status = start(corpus, folder, **changes).wait(300)
    assert status == 0, (folder / "output.log").read_text()[-4000:]
    return json.loads((folder / "result.json").read_text())


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Return the logged losses."""
    return [record["loss"] for record in records(folder)]
