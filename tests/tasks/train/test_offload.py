"""Layers that rest on the host: the same run to the bit, and what can't rest is refused before it starts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from pydantic import ValidationError

from flows.recipes import resolve
from tasks.adapters import lora_config
from tasks.errors import SpecError
from tasks.gptoss.forward import find_decoder
from tasks.gptoss.product import Era
from tasks.models import base_shapes
from tasks.specs import LoraSpec, TrainSpec, change
from tasks.train.needs import embedding_bytes, host_bytes
from tasks.train.plan import plan_step, smaller_plan
from tasks.train.weights import require_offloadable, resting_bytes
from tasks.train.worker import speed_up
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, losses
from tests.tasks.train.test_needs import plan_of, work_of
from tests.tiny import make_model
from tests.tiny_mxfp4 import pack_experts

pytestmark = pytest.mark.long

LAST = LoraSpec(
    rank=2,
    alpha=4,
    target_modules=("1.self_attn.q_proj", "1.self_attn.v_proj"),
    target_parameters=("1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"),
)
LAST_OF_24 = {"lora": {"target_parameters": ("23.mlp.experts.gate_up_proj", "23.mlp.experts.down_proj")}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


def fit_to(changes: dict[str, Any]) -> TrainSpec:
    return change(resolve("gptoss20b_lora_h100").train, changes)


@pytest.mark.parametrize("kernels", [{}, {"kernels": "stock"}, {"attention": "flash", "deterministic": True}])
def test_a_run_whose_lowest_layer_rests_is_the_same_to_the_bit(
    inputs: dict[str, Any], tmp_path: Path, kernels: dict[str, Any]
):
    """The third has joined layers, as a GPU has."""
    spec = SPEC.model_copy(update={"lora": LAST, "max_steps": 6, "save_steps": 3, "eval_steps": 3, **kernels})
    subject.run(inputs, tmp_path / "whole", spec)
    result = subject.run(inputs, tmp_path / "resting", spec.model_copy(update={"offload_layers": 1}))
    assert result["validation_loss_after"] < result["validation_loss_before"]
    assert "1 layers rest in the host's memory: " in (tmp_path / "resting/output.log").read_text()
    assert losses(tmp_path / "resting") == losses(tmp_path / "whole")
    assert adapter_digest(tmp_path / "resting") == adapter_digest(tmp_path / "whole")


@pytest.mark.parametrize("deterministic", [False, True])
def test_where_bits_count_a_layer_that_may_rest_stays_apart_wherever_it_lies(deterministic: bool):
    """On a GPU a joined layer rounds otherwise than one apart; on a CPU it does not."""
    model = get_peft_model(make_model(), lora_config(LAST))
    spec = SPEC.model_copy(update={"lora": LAST, "attention": "flash", "deterministic": deterministic})
    speed_up(model, spec, plan_of(1, "none"), Era(), is_flash=True)
    assert [hasattr(layer, "joint") for layer in find_decoder(model).layers] == [not deterministic, True]


@pytest.mark.parametrize("kernels", ["auto", "stock"])
def test_experts_in_mxfp4_rest_packed_and_the_run_is_the_same_to_the_bit(
    inputs: dict[str, Any], tmp_path: Path, kernels: str
):
    """Of 4 experts of 3 x 32 x 32 a layer: 17 bytes for 32 weights instead of 128, and four matrices of attention."""
    pack_experts(Path(inputs["base_folder"]), tmp_path / "base")
    packed = {**inputs, "base_folder": str(tmp_path / "base")}
    spec = SPEC.model_copy(update={"lora": LAST, "max_steps": 6, "save_steps": 3, "kernels": kernels})
    subject.run(packed, tmp_path / "whole", spec)
    subject.run(packed, tmp_path / "resting", spec.model_copy(update={"offload_layers": 1}))
    assert losses(tmp_path / "resting") == losses(tmp_path / "whole")
    assert adapter_digest(tmp_path / "resting") == adapter_digest(tmp_path / "whole")
    configs = [json.loads((tmp_path / run / "adapter/adapter_config.json").read_text()) for run in ("whole", "resting")]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"] == str(tmp_path / "base")
    said = re.search(r"rest in the host's memory: ([\d,]+) bytes", (tmp_path / "resting/output.log").read_text())
    shapes = base_shapes(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    [expected] = resting_bytes(shapes, config, spec, 1)
    assert said and int(said[1].replace(",", "")) == pytest.approx(expected, rel=0.05)  # aligned


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_resting_layers(inputs: dict[str, Any], tmp_path: Path):
    spec = SPEC.model_copy(update={"lora": LAST, "max_steps": 12, "save_steps": 2})
    subject.run(inputs, tmp_path / "whole", spec)
    for before, after in ((0, 1), (1, 0)):
        folder = tmp_path / f"{before}-{after}"
        process = subject.start(inputs, folder, spec.model_copy(update={"offload_layers": before}))
        subject.wait_for_step(folder, 5, process)
        subject.kill(process)
        subject.run(inputs, folder, spec.model_copy(update={"offload_layers": after}))
        said = (folder / "output.log").read_text()
        assert "resuming from checkpoint-" in said and said.count("layers rest in the host's memory") == 1
        assert losses(folder) == losses(tmp_path / "whole")
        assert adapter_digest(folder) == adapter_digest(tmp_path / "whole")


def test_a_layer_that_is_trained_is_never_let_rest(inputs: dict[str, Any], tmp_path: Path):
    """The plan forbids it; a worker that is told to all the same says so before its first step."""
    failure = subject.run(inputs, tmp_path / "run", SPEC.model_copy(update={"offload_layers": 1}))
    assert "8 weights of the 1 layers that rest on the host are trained, first self_attn.q_proj" in failure["message"]
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quantization": "int8"}, "can't move a base in int8"),
        ({"num_processes": 2}, "is for one process, but there are 2"),
        ({"launch": {"launcher": "torchrun", "nodes": 2, "address": "a", "processes_per_node": 1}}, "there are 2"),
    ],
)
def test_what_can_not_rest_is_an_error_of_the_recipe(changes: dict[str, Any], why: str):
    with pytest.raises((ValidationError, SpecError), match=why):
        fit_to({**LAST_OF_24, **changes, "offload_layers": -1})


@pytest.mark.parametrize(
    ("lora", "count", "why"),
    [
        (
            LAST_OF_24["lora"],
            24,
            r"offload_layers = 24 but the lowest adapter sits in layer 23 of 24: .* or set it to 23",
        ),
        ({"target_parameters": ("mlp.experts.down_proj",)}, -1, r"= -1 but the lowest adapter sits in layer 0 of 24"),
        (
            {"target_modules": ("23.self_attn.q_proj", "project_in")},
            1,
            r"= 1 but the lowest adapter sits in layer 0 of",
        ),
    ],
)
def test_only_layers_below_the_lowest_adapter_may_rest(lora: dict[str, Any], count: int, why: str):
    work = work_of(fit_to({"lora": lora, "offload_layers": count}), more={"model.project_in.weight": (2880, 2880)})
    with pytest.raises(SpecError, match=why):
        require_offloadable(work.config, work.spec, work.targets)


def test_what_rests_leaves_the_gpu_but_for_two_layers():
    """A layer of gpt-oss-20b is 1.646 GB, its vectors 0.00003."""
    work = work_of(fit_to(LAST_OF_24))
    whole, resting = work.needs(plan_of(1, "none")), work.needs(plan_of(1, "none", num_offloaded=20))
    assert resting["layers in passage"] + resting["activations"] == pytest.approx(2 * 1.646e9, rel=1e-3)
    assert whole["weights"] - resting["weights"] == sum(resting_bytes(work.shapes, work.config, work.spec, 20))
    table = embedding_bytes(work.shapes, work.config, work.spec)
    assert table == 2 * 201088 * 2880
    assert host_bytes(work.shapes, work.config, work.spec, 20) == whole["weights"] - resting["weights"] + table
    small = replace(work, config={**work.config, "quantization_config": {"quant_method": "mxfp4"}})
    packed = small.needs(plan_of(1, "none", num_offloaded=20))
    experts, others = 20 * 32 * 3 * 2880 * 2880, 20 * (2 * 4096 * 2880 + 2 * 512 * 2880 + 32 * 2880 + 32 * 8640)
    assert sum(resting_bytes(work.shapes, small.config, work.spec, 20)) == experts * 17 // 32 + 2 * others
    assert packed["weights"] == resting["weights"]
    assert (
        host_bytes(work.shapes, small.config, work.spec, 20)
        == experts * 17 // 32 + 2 * others + packed["weights"] + table
    )  # loading


@pytest.mark.parametrize(("room_gb", "most"), [(84, 0), (40, 9), (24, 18), (16, 23)])
def test_as_few_rest_as_make_it_fit(room_gb: float, most: int):
    work = work_of(fit_to({**LAST_OF_24, "offload_layers": -1, "gradient_accumulation": 4}))
    plan = plan_step(work, int(room_gb * 1e9))
    assert sum(work.needs(plan).values()) <= room_gb * 1e9
    assert plan.num_offloaded <= most and (plan.num_offloaded > 0) == (room_gb < 50)


def test_after_an_out_of_memory_more_rest():
    work = work_of(fit_to({**LAST_OF_24, "offload_layers": -1, "gradient_accumulation": 1}))
    plans = [plan_step(work, int(84e9))]
    while smaller := smaller_plan(work, plans[-1]):
        plans.append(smaller)
    needed = [sum(work.needs(plan).values()) for plan in plans]
    assert needed == sorted(needed, reverse=True) and plans[0].num_offloaded == 0 and plans[-1].num_offloaded == 23


def test_without_a_gpu_nothing_rests():
    assert plan_step(work_of(fit_to({**LAST_OF_24, "offload_layers": -1})), None).num_offloaded == 0
