"""Rollouts by transformers in gpt-oss-20b's shapes, one process, one GPU: `generate` beside continuous batching.

    python tests/bench/bench_rollouts_20b.py [ENGINE ...]     a JSON line each; rollouts_20b.json in $BENCH_OUT or $OUT

The model is loaded once, as the worker does it, with a random adapter on attention and all experts that says something;
then 32 questions are answered by each engine in turn. The first rollout compiles: name its engine twice. -graphs: with
CUDA graphs, which transformers leaves off where attention has a mask; -512: so many tokens at once, not 1,024.
Needs what bench_grpo_20b.py needs. BENCH_DIR: as there; BENCH_TOKENS: of each completion.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import bench_grpo_20b  # noqa: E402
from tests.bench.bench_train_20b import EXPERTS  # noqa: E402

ENGINES: dict[
    str, tuple[int, int] | None
] = {  # tokens of keys to which graphs are padded, tokens at once; 0: no graphs
    "transformers": None,
    "continuous": (0, 0),
    "continuous-graphs": (4096, 1024),
    "continuous-graphs-512": (2048, 512),
}


def with_graphs(
    sized: Callable[..., Any], keys: int, most: int, *args: Any, **kwargs: Any
) -> Any:  # Any: sized_cache's
    """Return the settings of `sized` with CUDA graphs."""
    config = sized(*args, **kwargs)
    if keys:
        config.use_cuda_graph, config.max_batch_tokens = (True, False), most
        config.q_padding_interval_size, config.kv_padding_interval_size = 32, keys
    return config


def make_trainer(work: Path, num_tokens: int) -> Any:  # Any: a GroupTrainer
    """Return the worker's trainer, ready to generate."""
    from tasks.reinforce import worker
    from tasks.specs import ReinforceSpec

    wanted = bench_grpo_20b.case(
        128, num_tokens, parameters=EXPERTS, rows_per_device=4, start=True, rollouts="continuous"
    )
    run = Path(tempfile.mkdtemp(prefix="rollouts-", dir=work))
    job = bench_grpo_20b.make_job(wanted, work, run)
    trainer = worker.make_trainer(job, ReinforceSpec.model_validate(job["spec"]))
    trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def measure(trainer: Any, engine: str) -> dict[str, Any]:  # Any: a GroupTrainer; JSON values
    """Let one engine answer the first 32 questions; return what that took, and what it shows of the adapter."""
    import torch

    from tasks.reinforce import continuous
    from tasks.training import fix_seeds

    wanted, sized = ENGINES[engine], continuous.sized_cache
    trainer.wanted.is_continuous = wanted is not None
    continuous.sized_cache = partial(with_graphs, sized, *(wanted or (0, 0)))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fix_seeds(0)
    try:
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    finally:
        continuous.sized_cache = sized
    done, found = trainer.rollout, trainer.rollout.agreement
    return {
        "engine": engine,
        "rollout_s": round(done.generate_s, 2),
        "tokens_per_s": round(done.num_generated / done.generate_s, 1),
        "adapter_share": found.share and round(found.share, 3),
        "adapter_share_error": round(found.share_error, 4),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Make the base, load it, measure; report after each."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "rollouts-gptoss20b", "skipped": "no CUDA device"}\n')
        return
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the product starts its worker
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = Path(os.environ.get("BENCH_DIR") or tempfile.mkdtemp(prefix="bench-grpo-"))
    work.mkdir(parents=True, exist_ok=True)
    bench_grpo_20b.need_base(work)
    engines = sys.argv[1:] or ["continuous", *ENGINES]
    trainer = make_trainer(work, int(os.environ.get("BENCH_TOKENS", "128")))
    report: list[dict[str, Any]] = []  # Any: JSON values
    for engine in engines:
        report.append(measure(trainer, engine))
        sys.stdout.write(json.dumps(report[-1]) + "\n")
        sys.stdout.flush()
        out = Path(os.environ.get("BENCH_OUT") or os.environ.get("OUT") or work)
        (out / "rollouts_20b.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
