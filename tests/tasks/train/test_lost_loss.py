"""A loss that is NaN or explodes ends the run at once, names its rows and leaves the last good checkpoint."""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.metrics import read_metrics
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


def poison(inputs: dict[str, Any], folder: Path, row: int) -> dict[str, Any]:
    """A base that answers NaN to one token, and rows of which only `row` holds it."""
    shutil.copytree(Path(inputs["base_folder"]), folder / "base")
    weights = folder / "base" / "model.safetensors"
    shutil.copytree(Path(inputs["packed_folder"]), folder / "packed")
    path = folder / "packed" / "train.parquet"
    table = pq.read_table(path)
    rows = table["input_ids"].to_pylist()
    unused = next(token for token in range(256) if not any(token in row for row in rows))
    rows[row][0] = unused
    tensors = load_file(str(weights))
    tensors["model.embed_tokens.weight"][unused] = float("nan")
    save_file(tensors, str(weights), metadata={"format": "pt"})
    index = table.column_names.index("input_ids")
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array(rows, table.schema.field(index).type)), path
    )
    return {**inputs, "base_folder": str(folder / "base"), "packed_folder": str(folder / "packed")}


@pytest.mark.parametrize(("accumulation", "log_steps"), [(1, 1), (2, 1), (1, 5)])
def test_nan_names_the_row_and_keeps_the_checkpoint_before(
    inputs: dict[str, Any], tmp_path: Path, accumulation: int, log_steps: int
):
    poisoned, row = poison(inputs, tmp_path, 3), 3
    changes = {"save_steps": 1, "gradient_accumulation": accumulation, "log_steps": log_steps, "seed": 1}
    spec = SPEC.model_copy(update=changes)
    told = subject.run(poisoned, tmp_path / "run", spec)
    assert told["error"] == "TrainingError"
    found = re.search(
        r"the loss is nan .*, at step (\d+), which learnt the packed rows ([\d, ]+); (\S+) ", told["message"]
    )
    assert found, told
    step, rows = int(found[1]), [int(word) for word in found[2].split(",")]
    assert row in rows and len(rows) <= 2 * accumulation
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint_step(kept) == step - 1
    if kept is not None:
        assert found[3] == kept.name
        weights = load_file(str(kept / "adapter_model.safetensors"))
        assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_an_exploding_loss_ends_the_run_and_no_checkpoint_holds_it(inputs: dict[str, Any], tmp_path: Path):
    told = subject.run(inputs, tmp_path, SPEC.model_copy(update={"save_steps": 1}), "explode_after_step_12")
    assert told["error"] == "TrainingError"
    assert "the loss explodes" in told["message"] and "5 times in a row, at step 17, which learnt" in told["message"]
    assert "checkpoint-12 is kept" in told["message"]
    assert checkpoint_step(latest_checkpoint(tmp_path / "checkpoints")) == 12
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 17


def test_a_spike_that_passes_ends_nothing(inputs: dict[str, Any], tmp_path: Path):
    spec = SPEC.model_copy(update={"max_steps": 16, "save_steps": 16})  # four steps of it
    assert subject.run(inputs, tmp_path, spec, "explode_after_step_12")["num_steps"] == 16


def test_rows_of_a_step_are_those_that_it_learnt(inputs: dict[str, Any], tmp_path: Path):
    """Over two epochs and with accumulation, held against what the model was really given."""
    from tasks.row_order import RowOrder
    from tasks.train.worker import load_base, make_trainer
    from tasks.training import fix_seeds

    spec = SPEC.model_copy(update={"max_steps": 9, "gradient_accumulation": 3, "save_steps": 100})
    given: list[list[int]] = []
    try:
        fix_seeds(spec.seed)
        trainer = make_trainer(
            load_base(Path(inputs["base_folder"]), spec), subject.make_job(inputs, tmp_path, spec), spec
        )
        learn = trainer.compute_loss

        def compute_loss(model: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given.append(batch["input_ids"].flatten().tolist())
            return learn(model, batch, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    rows = pq.read_table(Path(inputs["packed_folder"]) / "train.parquet")["input_ids"].to_pylist()
    order = RowOrder(trainer.callback_handler.train_dataloader, rows_per_step=6, accumulation=3)
    said = [token for step in range(1, 10) for row in order.rows(step) for token in rows[row]]
    learnt = [token for batch in given for token in batch]
    assert len(rows) < 9 * 6  # the run goes over an epoch
    assert said == learnt
