"""What every trainer process of ours shares: whole checkpoints, live metrics, a fixed start.

transformers' Trainer writes checkpoints in place and takes the highest number whatever it holds.
Here a checkpoint counts only once `COMPLETE.json` lists its files, so one that was torn by a
kill or a full disk is never resumed from.

Ring: edge; runs inside a trainer process (no Prefect).
"""

import json
import logging
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks import files
from tasks.errors import CorruptError, OutOfMemoryError, TrainingError
from tasks.metrics import truncate_metrics

COMPLETE = "COMPLETE.json"
RESULT = "result.json"
FAILURE = "failure.json"
logger = logging.getLogger(__name__)


def fix_seeds(seed: int, *, deterministic: bool = False) -> None:
    """Seed every generator that a model's construction draws from; on a CPU, let no sum depend on the threads' order.

    The grouped experts of transformers add up tokens by threads: without this two equal runs differ
    in the last bits, and a resumed run from the one that was never killed. On a GPU that costs speed: when asked.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without; read at its first call
    if deterministic or not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings: Any = torch.utils.deterministic  # Any: the stubs lack its property
        settings.fill_uninitialized_memory = False  # a debugging aid that costs time
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint whole: every file on disk, then the list of them."""
    names = files.list_files(checkpoint)
    for name in names:
        files.fsync_file(checkpoint / name)
    files.write_json(checkpoint / COMPLETE, {name: size for name, size in names.items() if name != COMPLETE})


def is_complete(checkpoint: Path) -> bool:
    """Say whether a checkpoint was marked and each of its files still has its size."""
    try:
        listed = files.read_json(checkpoint / COMPLETE)
    except (FileNotFoundError, NotADirectoryError, CorruptError):
        return False
    present = files.list_files(checkpoint)
    return all(present.get(name) == size for name, size in listed.items())


def latest_checkpoint(folder: Path, *, is_owner: bool = True) -> Path | None:
    """Return the newest whole `checkpoint-*`, or None; the owner (rank 0) removes torn ones."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if is_complete(checkpoint):
            return checkpoint
        if is_owner:
            logger.warning("%s is not whole: removed", checkpoint.name)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def checkpoint_step(checkpoint: Path | None) -> int:
    """Return the optimizer step of a checkpoint; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


class Recorder(TrainerCallback):
    """Append each log record to metrics.jsonl and say it in one line; stop on a loss that is not finite."""

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.tokens_per_step = tokens_per_step
        self._last = (0, time.monotonic())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure speed at the step that training starts from, and drop records of steps to be redone."""
        self._last = (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            truncate_metrics(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one record. Raises TrainingError on NaN or infinity."""
        logs = logs or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        step, now = state.global_step, time.monotonic()
        num_steps, seconds = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        record = {
            "step": step,
            "num_steps": state.max_steps,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "epoch": round(state.epoch or 0.0, 3),
            "tokens_per_s": round(num_steps * self.tokens_per_step / seconds) if seconds > 0 and num_steps else None,
            "time": time.time(),
        }
        if torch.cuda.is_available():
            record["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        with self.path.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        say(
            f"step {step}/{state.max_steps}  loss {record['loss']:.4f}  lr {record['learning_rate'] or 0:.2e}  "
            f"{record['tokens_per_s'] or 0} tokens/s"
        )
        if not math.isfinite(float(logs["loss"])):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {step}: the last good checkpoint is kept; lower learning_rate or "
                "look at the rows of this step"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step, whatever log_steps says: the artifact names its loss."""
        control.should_log |= state.global_step >= state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written as whole, once every rank has written its part.

        Raises TrainingError when a weight is not finite: log_steps may skip the step that broke it, and every later
        try would resume from it.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        trained = (weight for weight in kwargs["model"].parameters() if weight.requires_grad)
        if not all(bool(torch.isfinite(weight).all()) for weight in trained):
            raise TrainingError(
                f"weights are not finite at step {state.global_step}: the checkpoint before is kept; lower "
                "learning_rate"
            )
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


def say(line: str) -> None:
    """Print one line for the supervising process, which logs it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_worker(folder: Path, work: Any) -> None:  # Any: a callable without arguments
    """Run `work`; write down why it failed, so that the parent can raise the right class of error."""
    if is_rank_zero():
        for name in (RESULT, FAILURE):
            (folder / name).unlink(missing_ok=True)
    try:
        work()
    except torch.OutOfMemoryError as error:
        _fail(folder, OutOfMemoryError.__name__, f"the GPU ran out of memory: {str(error).splitlines()[0]}")
        raise
    except MemoryError as error:
        _fail(folder, OutOfMemoryError.__name__, f"the machine ran out of memory: {error}")
        raise
    except Exception as error:
        _fail(folder, type(error).__name__, str(error))
        raise


def is_rank_zero() -> bool:
    """Say whether this process is the first of the run; torchrun sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def _fail(folder: Path, kind: str, message: str) -> None:
    if is_rank_zero():
        files.write_json(folder / FAILURE, {"error": kind, "message": message})
