"""PEFT's own deltas are computed once; each fault that has been reported of a merge must be seen by them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tasks import files
from tasks.errors import ShapeError
from tasks.merge.peft_check import PeftSide
from tasks.merge.plan import MergePlan, Output, plan_merge
from tasks.merge.reader import Reader
from tasks.merge.sample import choose_sample
from tests.merging import ATTENTION, EXPERTS, stream, write_adapter, write_base
from tests.tiny import SHAPE

pytestmark = pytest.mark.long


class Case:
    """A merge whose parts can be swapped before PEFT's side looks at it."""

    def __init__(self, folder: Path, side: PeftSide) -> None:
        self.folder, self.side = folder, side
        self.config = files.read_json(folder / "adapter/adapter_config.json")

    def plan(self, **config: Any) -> MergePlan:  # Any: LoraConfig's fields
        with Reader.opened(self.folder / "base") as base, Reader.opened(self.folder / "adapter") as deltas:
            given = {**self.config, **config}
            return plan_merge(base.headers, deltas.headers, given, dtype="BF16", experts="plain", shard_bytes=10**9)

    def check(self, plan: MergePlan, adapter: str = "adapter", merged: str = "merged") -> dict[str, Any]:
        """PEFT's word. Any: JSON values"""
        with (
            Reader.opened(self.folder / "base") as base,
            Reader.opened(self.folder / adapter) as deltas,
            Reader.opened(self.folder / merged) as written,
        ):
            return self.side.check(plan, base, deltas, written)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("case")
    write_base(folder / "base", SHAPE)
    write_adapter(folder / "adapter", SHAPE, target_modules=ATTENTION, target_parameters=EXPERTS, use_rslora=True)
    with PeftSide.started(folder / "adapter", folder / "base", folder / "peft") as side:
        stream(folder / "base", folder / "adapter", folder / "merged", shard_bytes=1_000_000)
        yield Case(folder, side)


def changed_adapter(case: Case, folder: str, change: str) -> str:
    """Write an adapter whose gate_up_proj was laid out in another way; return its folder's name."""
    tensors = load_file(case.folder / "adapter/adapter_model.safetensors")
    for name in [name for name in tensors if "experts.base_layer.lora_" in name]:
        if change == "gate and up swapped" and name.endswith("B.weight"):
            tensors[name] = tensors[name].unflatten(0, (-1, 2)).flip(1).flatten(0, 1).contiguous()
        if change == "gate and up in halves" and name.endswith("B.weight"):
            tensors[name] = torch.cat([tensors[name][0::2], tensors[name][1::2]])
        if change == "experts shifted" and name.endswith("A.weight"):
            tensors[name] = tensors[name].roll(8, 0)
        if change == "columns expert-major" and name.endswith("B.weight"):
            tensors[name] = tensors[name].unflatten(1, (8, 4)).transpose(1, 2).flatten(1).contiguous()
    (case.folder / folder).mkdir()
    save_file(tensors, case.folder / folder / "adapter_model.safetensors")
    return folder


def test_a_right_merge_passes(case: Case):
    found = case.check(case.plan())
    assert (found["tensors"], found["values"]) == (12, 2 * (32 * 32 * 2 + 16 * 32 * 2 + 2 * 32 * 64 + 2 * 32 * 32))
    assert found["largest_gap"] < 1e-6


@pytest.mark.parametrize(
    "change", ["gate and up swapped", "gate and up in halves", "experts shifted", "columns expert-major"]
)
def test_another_layout_is_seen(case: Case, change: str):
    with pytest.raises(ShapeError, match=r"our delta of model\.layers\.\d\.mlp\.experts\.gate_up_proj is not PEFT's"):
        case.check(case.plan(), adapter=changed_adapter(case, change.replace(" ", "-"), change))


@pytest.mark.parametrize("config", [{"lora_alpha": 32}, {"use_rslora": False}, {"alpha_pattern": {"q_proj": 17}}])
def test_another_scale_is_seen(case: Case, config: dict[str, Any]):
    with pytest.raises(ShapeError, match=r"our delta of .* is not PEFT's: they differ by [\d.]+ of its norm"):
        case.check(case.plan(**config))


def _edit(plan: MergePlan, name: str) -> MergePlan:
    def dropped(output: Output) -> Output:
        return replace(output, change=None) if output.name == name else output

    return MergePlan(shards=tuple(tuple(dropped(output) for output in shard) for shard in plan.shards))


def test_a_dropped_change_is_seen(case: Case):
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(ShapeError, match=f"PEFT changes other parameters than this merge: {name}"):
        case.check(_edit(case.plan(), name))


def test_a_shard_that_is_not_base_plus_delta_is_seen(case: Case):
    tensors = {}
    for path in (case.folder / "merged").glob("*.safetensors"):
        tensors |= load_file(path)
    name = "model.layers.0.mlp.experts.down_proj"
    base = {k: v for path in (case.folder / "base").glob("*.safetensors") for k, v in load_file(path).items()}
    (case.folder / "dropped").mkdir()
    save_file({**tensors, name: base[name]}, case.folder / "dropped/model.safetensors")
    with pytest.raises(ShapeError, match=rf"{name} was not written as base plus delta"):
        case.check(case.plan(), merged="dropped")


@given(st.text(min_size=1), st.integers(2, 130), st.integers(1, 40).map(lambda n: 32 * n), st.integers(1, 3000))
def test_a_sample_lies_inside_and_on_whole_blocks(name: str, experts: int, rows: int, columns: int):
    sample = choose_sample(name, (experts, rows, columns))
    assert len(set(sample.experts)) == 2 and all(0 <= expert < experts for expert in sample.experts)
    for span, size in ((sample.rows, rows), (sample.columns, columns)):
        assert 0 <= span.start < span.stop <= size and span.stop - span.start == min(64, size)
    assert sample.rows.start % 32 == 0 and (sample.rows.stop - sample.rows.start) % 32 == 0
    assert choose_sample(name, (rows, columns)).experts == ()
