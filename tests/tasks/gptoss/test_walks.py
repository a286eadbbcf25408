"""Trainer with fewer walks over the modules: the same modes in each pass, the same count of operations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tasks.gptoss.walks import FewWalks
from tests.tiny import make_model


class WatchedTrainer(FewWalks, Trainer):
    """Writes down how many modules are in training mode in each pass, and how often a mode is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_training: list[set[bool]] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.in_training.append({module.training for module in model.modules()})
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture
def trainer(tmp_path: Path) -> WatchedTrainer:
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(8 * 6).view(8, 6) % 50]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return WatchedTrainer(make_model().eval(), settings, train_dataset=rows, eval_dataset=rows)


def test_all_modules_learn_in_training_mode_and_are_judged_out_of_it(
    trainer: WatchedTrainer, monkeypatch: pytest.MonkeyPatch
):
    walks: list[bool] = []
    walk = torch.nn.Module.train

    def train(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        if module is trainer.model:
            walks.append(mode)
        return walk(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", train)
    trainer.train()
    assert trainer.in_training == [{True}] * 4 + [{False}] + [{True}] * 2 + [{False}]  # judged twice
    assert walks == [True, False, True, False]  # none in the passes between
    assert "train" not in vars(trainer.model)


def test_the_first_pass_sets_the_mode_also_where_the_model_says_that_it_is_set(trainer: WatchedTrainer):
    """As of a resumed run, which is not judged first: PEFT's model is in training mode, the base within is not."""
    trainer.model.training = True
    trainer.train()
    assert trainer.in_training == [{True}] * 4 + [{False}] + [{True}] * 2 + [{False}]


def test_a_wrapped_model_that_was_judged_learns_in_training_mode(trainer: WatchedTrainer):
    """As within DDP: without dropout and without checkpointing it was another run, and one that took more memory."""
    inner, inputs = trainer.model, {name: torch.arange(6)[None] for name in ("input_ids", "labels")}
    wrapped = torch.nn.DataParallel(inner)  # on a CPU it only wraps
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(2):
        inner.eval()
        trainer.training_step(wrapped, inputs)
        trainer.training_step(wrapped, inputs)
    assert trainer.in_training == [{True}] * 4


def test_the_operations_that_a_checkpoint_tells_are_trainers_own(trainer: WatchedTrainer):
    trainer.train()
    own = Trainer.floating_point_ops(trainer, {"input_ids": torch.zeros(1, 6)})
    assert trainer.state.total_flos == 6 * own > 0
