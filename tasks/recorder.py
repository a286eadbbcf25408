"""Live figures of a training run, and the end of one whose loss is lost.

    Trainer's log -> Recorder -> metrics.jsonl, evaluations.jsonl, one line for the log

Ring: edge; runs inside a trainer process (no Prefect).  Units: tokens, seconds, bytes; FLOPs per token.
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.checkpoints import say_kept
from tasks.divergence import count_exploding
from tasks.errors import TrainingError
from tasks.lifeline import lifeline
from tasks.metrics import append_metrics, truncate_metrics
from tasks.row_order import RowOrder

_NAMED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What a step is measured by and when its loss ends the run."""

    row_tokens: Sequence[int] | np.ndarray | int  # tokens of each row, or of every row
    rows_per_step: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0  # of all devices of the run; 0: not known, and no MFU is told
    explosion_factor: float = 3.0
    explosion_steps: int = 5

    def tokens_of(self, row: int) -> int:
        """Return the tokens of one row."""
        return self.row_tokens if isinstance(self.row_tokens, int) else int(self.row_tokens[row])


class Recorder(TrainerCallback):
    """Append each log record to metrics.jsonl and say it in one line; end the run when its loss is lost."""

    def __init__(self, folder: Path, measures: Measures) -> None:
        self.path, self.evaluations = folder / "metrics.jsonl", folder / "evaluations.jsonl"
        self.measures = measures
        self._last = (0, time.monotonic())
        self._counted = (0, 0)  # step, tokens learnt up to it
        self._steps_s: deque[float] = deque(maxlen=20)
        self._order: RowOrder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure speed at the step that training starts from, and drop records of steps to be redone."""
        self._last = (state.global_step, time.monotonic())
        self._order = RowOrder(
            kwargs["train_dataloader"],
            rows_per_step=self.measures.rows_per_step,
            accumulation=args.gradient_accumulation_steps,
        )
        self._counted = (0, 0)
        self._count_tokens(state.global_step)
        if state.is_world_process_zero:
            truncate_metrics(self.path, state.global_step)
            truncate_metrics(self.evaluations, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one record. Raises TrainingError on NaN, infinity, or a loss that explodes."""
        logs = logs or {}
        if "eval_loss" in logs and state.is_world_process_zero and lifeline.is_in_loop:
            append_metrics(self.evaluations, {"step": state.global_step, "eval_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        if state.is_world_process_zero:
            record = self._measure(state, logs)
            append_metrics(self.path, record)
            mfu = f"  MFU {record['mfu_pct']:.0f} %" if record["mfu_pct"] else ""
            judged = ""
            if "accuracy" in record:
                judged = f"ppl {math.exp(min(record['loss'], 99.0)):.2f}  acc {record['accuracy']:.3f}  "
            say(
                f"step {state.global_step}/{state.max_steps}  loss {record['loss']:.4f}  {judged}"
                f"lr {record['learning_rate'] or 0:.2e}  {record['tokens_per_s'] or 0} tokens/s{mfu}"
            )
        self._require_sound(args, state, control, logs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log a step whose gradient is not finite, whatever log_steps says: its rows are those to be named."""
        if args.logging_steps > 1:
            slopes = [weight.grad for weight in kwargs["model"].parameters() if weight.grad is not None]
            control.should_log |= not bool(torch.isfinite(torch.nn.utils.get_total_norm(slopes)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step, whatever log_steps says: the artifact names its loss."""
        control.should_log |= state.global_step >= state.max_steps

    def _measure(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
        step, now, (counted, before) = state.global_step, time.monotonic(), self._counted
        num_steps, seconds = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        tokens = self._count_tokens(step)
        speed = (tokens - before) / seconds if seconds > 0 and step > counted else None
        if num_steps and seconds > 0:
            self._steps_s.append(seconds / num_steps)
        peak = self.measures.peak_flops
        return {
            "step": step,
            "num_steps": state.max_steps,
            "loss": logs["loss"],
            **{name: logs[name] for name in ("accuracy", "router_aux_loss") if name in logs},
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "epoch": round(state.epoch or 0.0, 3),
            "tokens": tokens,
            "tokens_per_s": round(speed) if speed else None,
            "mfu_pct": round(100 * speed * self.measures.flops_per_token / peak, 2) if speed and peak else None,
            **_peak_memory(),
            "seconds_left": round(median(self._steps_s) * (state.max_steps - step), 1) if self._steps_s else None,
            "time": time.time(),
        }

    def _count_tokens(self, step: int) -> int:
        """Return the tokens learnt up to a step: from the order of rows, so a resumed run counts on where it was."""
        assert self._order is not None
        since, tokens = self._counted
        self._counted = (step, tokens + self._order.total(step, self.measures.tokens_of, since=since))
        return self._counted[1]

    def _require_sound(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any]
    ) -> None:
        """Raise TrainingError where the loss is lost; while it is in doubt, write no checkpoint."""
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        norm = logs.get("grad_norm")
        streak = count_exploding(losses, self.measures.explosion_factor)
        if math.isfinite(losses[-1]) and (norm is None or math.isfinite(norm)):
            if streak < self.measures.explosion_steps:
                control.should_save &= streak == 0
                return
            fault = f"the loss explodes: {losses[-1]:.4g} after {losses[-streak - 1]:.4g}, {streak} times in a row"
        else:
            fault = f"the loss is {losses[-1]:.4g} and the gradient's norm {norm}"
        step = state.global_step
        assert self._order is not None
        rows = self._order.rows(step)
        named = ", ".join(map(str, rows[:_NAMED_ROWS])) + (" ..." if len(rows) > _NAMED_ROWS else "")
        raise TrainingError(
            f"{fault}, at step {step}, which learnt the packed rows {named}; "
            f"{say_kept(Path(args.output_dir or '.'))}: lower learning_rate, or look at these rows"
        )


def say(line: str) -> None:
    """Print one line for the supervising process, which logs it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _peak_memory() -> dict[str, int]:
    """Return the most memory that this process held, of the GPU also what it holds; without one of the host."""
    if torch.cuda.is_available():
        return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(), "gpu_bytes": torch.cuda.memory_allocated()}
    return {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
