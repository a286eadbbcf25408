"""Keep the adapter of the lowest validation loss, and stop when it gets no lower; exact also for a resumed run.

    evaluation is the best so far -> checkpoints/best/ -> (by hard links) into each checkpoint -> loaded at the end

Each checkpoint carries the best adapter of its own past: a run that goes on from an older checkpoint goes on with the
best of then.

Ring: edge; runs inside the trainer process.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from tasks.checkpoints import link_folder
from tasks.lifeline import lifeline
from tasks.specs import TrainSpec
from tasks.train.validation import best_step, evaluations, is_over
from tasks.training import Keeper

_BEST = "best"


class BestKeeper(Keeper):
    """A Keeper that also looks at each evaluation."""

    def __init__(self, trainer: SFTTrainer, spec: TrainSpec) -> None:
        self.trainer, self.spec = trainer, spec
        self.keep_checkpoints = spec.keep_checkpoints

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the best adapter aside; end the run, with a checkpoint that says so, when patience is over."""
        if not lifeline.is_in_loop:
            return
        done = evaluations(state.log_history)
        if self.spec.keep_best and best_step(done, self.spec.early_stopping_min_delta) == state.global_step:
            self._put_aside(Path(args.output_dir or ".") / _BEST)
        if is_over(done, self.spec.early_stopping_patience, self.spec.early_stopping_min_delta):
            control.should_training_stop = control.should_save = True
            self.prepare_save(args, state, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the checkpoint the best adapter before it is marked as whole."""
        folder = Path(args.output_dir or ".")
        if state.is_world_process_zero:
            link_folder(folder / _BEST, folder / f"checkpoint-{state.global_step}" / _BEST)
        super().on_save(args, state, control, **kwargs)

    def _put_aside(self, best: Path) -> None:
        aside = best.with_name(f"{_BEST}.tmp")
        self.trainer.save_model(str(aside), _internal_call=True)  # every rank: sharded weights are gathered
        if self.trainer.is_world_process_zero():
            shutil.rmtree(best, ignore_errors=True)
            aside.rename(best)


def restore_best(folder: Path, checkpoint: Path | None) -> None:
    """Make `checkpoints/best` what it was when `checkpoint` was written. Rank 0 only."""
    shutil.rmtree(folder / f"{_BEST}.tmp", ignore_errors=True)
    link_folder(checkpoint / _BEST if checkpoint else folder / "none", folder / _BEST)


def load_best(trainer: SFTTrainer, spec: TrainSpec) -> int:
    """Give the model the weights of its best evaluation; return their step, 0 when it keeps the last ones."""
    best = Path(trainer.args.output_dir or ".") / _BEST
    if not spec.keep_best or not best.is_dir():
        return 0
    trainer._load_from_checkpoint(str(best))
    return best_step(evaluations(trainer.state.log_history), spec.early_stopping_min_delta)
