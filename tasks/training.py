"""What every trainer process of ours shares: whole checkpoints, a fixed start, an orderly end.

    run_worker(folder, work) -> result.json, or failure.json with the class of the error
    Keeper -> checkpoints, heartbeat, SIGTERM        (metrics: tasks/recorder.py)

Ring: edge; runs inside a trainer process (no Prefect).
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks import files
from tasks.checkpoints import drop_old, is_disk_full, mark_complete, require_room, say_kept
from tasks.errors import CapacityError, OutOfMemoryError, TataraError, TrainingError, TransientError
from tasks.lifeline import Stopped, lifeline
from tasks.metrics import read_metrics

RESULT = "result.json"
FAILURE = "failure.json"


def fix_seeds(seed: int, *, deterministic: bool = False) -> None:
    """Seed every generator that a model's construction draws from; on a CPU, let no sum depend on the threads' order.

    The grouped experts of transformers add up tokens by threads: without this two equal runs differ
    in the last bits, and a resumed run from the one that was never killed. `deterministic` asks the same of a GPU.
    """
    if deterministic or not torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose anew each time
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic_settings: Any = torch.utils.deterministic  # Any: the stubs lack its property
        deterministic_settings.fill_uninitialized_memory = False  # a debugging aid that costs time
        # Where an operation may only warn, SDPA's faster kernels add up the gradient of a masked row as it comes.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Keeper(TrainerCallback):
    """Checkpoints that are whole or not there, a heartbeat that says what goes on, and a last checkpoint on SIGTERM."""

    keep_checkpoints = 2

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a stop waits for the end of the step."""
        lifeline.is_in_loop = True
        lifeline.beat("train", state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One accumulated batch is progress."""
        lifeline.beat("train", state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One batch of an evaluation is progress."""
        lifeline.beat("evaluate", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop with a checkpoint when told to, and see that the disk can take it. Raises CapacityError."""
        lifeline.beat("train", state.global_step)
        if is_told_on_any_rank(args):
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self.prepare_save(args, state, kwargs["model"])

    def prepare_save(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:  # Any: any torch module
        """Look at the disk before a checkpoint is begun."""
        lifeline.beat("save", state.global_step)
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        require_room(Path(args.output_dir or "."), trained, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written as whole, once every rank has written its part.

        Raises TrainingError when a weight is not finite: log_steps may skip the step that broke it, and every later
        try would resume from it.
        """
        lifeline.beat("save", state.global_step)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        trained = (weight for weight in kwargs["model"].parameters() if weight.requires_grad)
        if not all(bool(torch.isfinite(weight).all()) for weight in trained):
            raise TrainingError(
                f"weights are not finite at step {state.global_step}: the checkpoint before is kept; lower "
                "learning_rate"
            )
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            mark_complete(folder / f"checkpoint-{state.global_step}")
            drop_old(folder, self.keep_checkpoints)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A stop need not wait any more: what is left is done again in seconds."""
        lifeline.is_in_loop = False


def is_told_on_any_rank(args: TrainingArguments) -> bool:
    """Say whether any rank was told to stop: they end after the same step, or the others would wait for ever."""
    if args.world_size == 1:
        return lifeline.is_told
    told = torch.tensor(int(lifeline.is_told), device=args.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def require_end(state: TrainerState, planned: int, *, is_over: bool = False) -> None:
    """Raise Stopped when training returned before its last step, as it does, normally, after a SIGTERM.

    `is_over` says that it ended early by its own rule.
    """
    if state.global_step < planned and not is_over:
        raise Stopped(f"after step {state.global_step} of {planned}")


def outcome(trainer: Trainer, folder: Path, before: float, after: float) -> dict[str, Any]:  # Any: JSON values
    """Return what every adapter's result.json says: steps, parameters, losses of the first and last recorded step."""
    metrics = read_metrics(folder / "metrics.jsonl")
    return {
        "num_steps": trainer.state.global_step,
        "num_trainable": trainer.get_num_trainable_parameters(),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "validation_loss_before": before,
        "validation_loss_after": after,
    }


def run_worker(folder: Path, work: Callable[[], None], *, stop_grace_s: float = 25.0) -> None:
    """Run `work`; write down why it failed, each rank for itself, so that the parent can raise the right error."""
    lifeline.start(folder, stop_grace_s, rank=read_rank())
    _failure_file(folder).unlink(missing_ok=True)
    if is_rank_zero():
        (folder / RESULT).unlink(missing_ok=True)
    try:
        work()
    except Stopped as stopped:
        where = str(stopped) or f"in phase {lifeline.phase}"
        kept = say_kept(folder / "checkpoints")
        _fail(folder, TransientError.__name__, f"the trainer was told to stop (SIGTERM) {where}: {kept}")
        raise SystemExit(143) from stopped
    except torch.OutOfMemoryError as error:
        _fail(folder, OutOfMemoryError.__name__, f"the GPU ran out of memory: {str(error).splitlines()[0]}")
        raise
    except MemoryError as error:
        _fail(folder, OutOfMemoryError.__name__, f"the machine ran out of memory: {error}")
        raise
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, CapacityError):
            kept = say_kept(folder / "checkpoints")
            message = f"the disk below {folder} ran full ({error}): {kept}; free some space and run again"
            _fail(folder, CapacityError.__name__, message)
        else:
            _fail(folder, type(error).__name__, str(error) if isinstance(error, TataraError) else repr(error))
        raise


def read_rank() -> int:
    """Return which process of the run this is; torchrun sets RANK."""
    return int(os.environ.get("RANK", "0"))


def is_rank_zero() -> bool:
    """Say whether this process is the first of the run."""
    return read_rank() == 0


def _failure_file(folder: Path) -> Path:
    return folder / (FAILURE if is_rank_zero() else f"failure_{read_rank()}.json")


def _fail(folder: Path, kind: str, message: str) -> None:
    sayable = message.encode(errors="backslashreplace").decode()  # half a character, as models write some, is no UTF-8
    files.write_json(_failure_file(folder), {"error": kind, "message": sayable})
