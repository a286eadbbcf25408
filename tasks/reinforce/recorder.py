"""What a GRPO run leaves while it goes on: metrics.csv, generations.csv, metrics.jsonl, one line for the log.

Ring: edge; runs inside a trainer process (no Prefect).  Units: seconds, tokens, bytes.
"""

import math
import resource
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.checkpoints import say_kept
from tasks.errors import TrainingError
from tasks.metrics import append_metrics, truncate_metrics
from tasks.recorder import say
from tasks.reinforce.columns import generations_columns, metrics_columns
from tasks.reinforce.group import GroupTrainer, Rollout
from tasks.reinforce.streams import CsvStream
from tasks.specs import ReinforceSpec
from tasks.training import Keeper

_STOP_AFTER = 10  # logged steps whose mean reward is looked at
_RENAMED = {
    "loss": "loss", "reward": "reward", "reward_std": "reward_std", "kl": "kl", "entropy": "entropy",
    "clip_ratio/region_mean": "clip_ratio", "cispo_clip_ratio": "clip_ratio",
    "frac_reward_zero_std": "same_reward_share", "completions/mean_length": "completion_tokens",
    "completions/min_length": "completion_tokens_min", "completions/max_length": "completion_tokens_max",
    "completions/clipped_ratio": "cut_off_share", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
}  # fmt: skip


class GroupRecorder(TrainerCallback):
    """Write each step down before its checkpoint is begun; end the run when its loss is lost or its KL runs away."""

    def __init__(self, folder: Path, trainer: GroupTrainer, spec: ReinforceSpec) -> None:
        self.trainer, self.spec = trainer, spec
        self.metrics = CsvStream(folder / spec.metrics_csv, metrics_columns(spec))
        self.generations = CsvStream(folder / spec.generations_csv, generations_columns(spec))
        self.lines = folder / "metrics.jsonl"
        self._begun = time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=20)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what will be done again."""
        for stream in (self.metrics, self.generations):
            stream.cut(state.global_step)
        truncate_metrics(self.lines, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the time."""
        self._begun = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one step. Raises TrainingError for a loss that is not finite and a KL above its limit."""
        logs = logs or {}
        if "loss" not in logs:
            return
        rollout, self.trainer.rollout = self.trainer.rollout, None
        record = self._measure(state, logs, rollout)
        if rollout:
            self.generations.append(rollout.rows)
        self.metrics.append([record])
        append_metrics(self.lines, record)
        say(_line(state, record))
        self._require_sound(args, state, record)
        if is_good_enough(state, self.spec):
            control.should_training_stop = control.should_save = True

    def _measure(
        self, state: TrainerState, logs: dict[str, Any], rollout: Rollout | None
    ) -> dict[str, Any]:  # Any: JSON values
        seconds = time.monotonic() - self._begun
        self._steps_s.append(seconds)
        record: dict[str, Any] = {"step": state.global_step, "num_steps": state.max_steps}
        record |= {ours: logs[theirs] for theirs, ours in _RENAMED.items() if theirs in logs}
        for reward in self.spec.rewards:
            for kind in ("mean", "std"):
                record[f"{reward.column}_{kind}"] = logs.get(f"rewards/{reward.column}/{kind}")
        if rollout:
            record |= _rollout_values(rollout, seconds)
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return record | {
            "peak_bytes": peak,
            "peak_gpu_bytes" if on_gpu else "peak_host_bytes": peak,
            "seconds_left": round(median(self._steps_s) * (state.max_steps - state.global_step), 1),
            "time": round(time.time(), 3),
        }

    def _require_sound(self, args: TrainingArguments, state: TrainerState, record: dict[str, Any]) -> None:
        norm, kl = record.get("grad_norm"), record.get("kl")
        kept = say_kept(Path(args.output_dir or "."))
        if not math.isfinite(record["loss"]) or (norm is not None and not math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {record['loss']:.4g} and the gradient's norm {norm} at step {state.global_step}; {kept}: "
                f"lower learning_rate, or look at that step in {self.generations.path.name}"
            )
        if self.spec.max_kl and kl is not None and kl > self.spec.max_kl:
            raise TrainingError(
                f"the KL from the start is {kl:.4g} at step {state.global_step}, above ReinforceSpec.max_kl = "
                f"{self.spec.max_kl:g}; {kept}: raise beta or lower learning_rate"
            )


class PeriodKeeper(Keeper):
    """A Keeper that stops only between rollouts: what is half used is in no checkpoint."""

    def __init__(self, spec: ReinforceSpec) -> None:
        self.keep_checkpoints, self._period = spec.keep_checkpoints, spec.num_iterations

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop with a checkpoint when told to, at the next step that ends the use of a rollout."""
        if state.global_step % self._period == 0 or state.global_step >= state.max_steps:
            super().on_step_end(args, state, control, **kwargs)


def is_good_enough(state: TrainerState, spec: ReinforceSpec) -> bool:
    """Say whether the last steps' mean reward ends the run; the same for a run that goes on from a checkpoint."""
    if spec.stop_at_reward is None or state.global_step % spec.num_iterations:
        return False
    rewards = [entry["reward"] for entry in state.log_history if "reward" in entry][-_STOP_AFTER:]
    return len(rewards) == _STOP_AFTER and sum(rewards) / _STOP_AFTER >= spec.stop_at_reward


def _rollout_values(rollout: Rollout, seconds: float) -> dict[str, Any]:  # Any: JSON values
    found, learn_s = rollout.agreement, seconds - rollout.generate_s - rollout.score_s
    return {
        "ratio_mean": found.ratio_mean,
        "ratio_min": found.ratio_min,
        "ratio_max": found.ratio_max,
        "adapter_share": found.share,
        "adapter_share_error": found.share_error if math.isfinite(found.share_error) else None,
        "adapter_change": found.change,
        "rollout_s": round(rollout.generate_s, 3),
        "score_s": round(rollout.score_s, 3),
        "learn_s": round(learn_s, 3),
        "rollout_tokens_per_s": round(rollout.num_generated / max(1e-9, rollout.generate_s), 1),
        "learnt_tokens_per_s": round(rollout.num_learnt / max(1e-9, learn_s), 1),
    }


def _line(state: TrainerState, record: dict[str, Any]) -> str:  # Any: JSON values
    share = record.get("adapter_share")
    adapter = f"  adapter {100 * share:.0f} %" if share is not None else ""
    ratio = f"  ratio {record['ratio_mean']:.3f}" if "ratio_mean" in record else ""
    return (
        f"step {state.global_step}/{state.max_steps}  reward {record.get('reward') or 0:.3f}  loss {record['loss']:.4f}"
        f"  {record.get('completion_tokens') or 0:.0f} tokens{ratio}{adapter}  lr {record['learning_rate'] or 0:.2e}"
    )
