"""The validation loss is that of the tokens: the same however the rows are cut into passes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import DataError
from tasks.train.worker import load_base, make_trainer
from tests.tasks.train.runs import SPEC, make_inputs, make_job


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("validation"))


def evaluate(inputs: dict[str, Any], folder: Path, **changes: Any) -> float:
    spec = SPEC.model_copy(update=changes)
    trainer = make_trainer(load_base(Path(inputs["base_folder"]), spec), make_job(inputs, folder, spec), spec)
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("kernels", ["fused", "stock"])
def test_it_does_not_depend_on_the_rows_of_a_pass(inputs: dict[str, Any], tmp_path: Path, kernels: str):
    one, three, all_at_once = (
        evaluate(inputs, tmp_path, rows_per_device=rows, kernels=kernels) for rows in (1, 3, 100)
    )
    assert one == pytest.approx(three, rel=1e-6)
    assert one == pytest.approx(all_at_once, rel=1e-6)


def test_rows_without_an_answer_do_not_count_and_none_at_all_is_refused(inputs: dict[str, Any], tmp_path: Path):
    packed = Path(inputs["packed_folder"])
    rows = pq.read_table(packed / "validation.parquet").to_pylist()
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    losses = []
    for name, some in (("plain", rows), ("more", rows + silent), ("silent", silent)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.parquet").symlink_to(packed / "train.parquet")
        schema = pq.read_schema(packed / "validation.parquet")
        pq.write_table(pa.Table.from_pylist(some, schema=schema), folder / "validation.parquet")
        if name == "silent":
            with pytest.raises(DataError, match="no validation row holds a token that is learnt"):
                evaluate({**inputs, "packed_folder": str(folder)}, folder, rows_per_device=1)
        else:
            losses.append(evaluate({**inputs, "packed_folder": str(folder)}, folder, rows_per_device=1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
