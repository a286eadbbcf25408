"""The estimate of a training step's memory, held against peaks that were measured on a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.recipes import resolve
from tasks import machine
from tasks.costs import say_needs
from tasks.errors import CapacityError, SpecError
from tasks.gptoss.layout import config_values, parameter_shapes
from tasks.specs import GptOssShape, TrainSpec, change
from tasks.targets import Shapes, find_targets
from tasks.train import run as subject
from tasks.train.needs import embedding_bytes, host_bytes, require_aligned
from tasks.train.plan import StepPlan, Workload, plan_step, smaller_plan
from tests.bench.bench_qlora_110b import SHAPE

BASELINES = Path(__file__).resolve().parents[2] / "bench/baselines"
BASELINE, BASELINE_110B = BASELINES / "train_gptoss20b_h200.json", BASELINES / "train_qlora_110b_h200.json"
GPTOSS20B = GptOssShape(
    num_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_experts=32,
    experts_per_token=4,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    context_tokens=131072,
    initial_context_tokens=4096,
    rope_factor=32.0,
)
ALL_EXPERTS = {"lora": {"target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}}


def work_of(spec: TrainSpec, row_tokens: int = 4096, more: Shapes | None = None) -> Workload:
    shapes = parameter_shapes(GPTOSS20B) | (more or {})
    config = {"model_type": "gpt_oss", **config_values(GPTOSS20B)}
    return Workload(
        shapes=shapes,
        config=config,
        spec=spec,
        targets=find_targets(shapes, spec.lora),
        row_tokens=row_tokens,
        document_tokens=row_tokens,
    )


def plan_of(
    rows: int, checkpointing: str, num_recomputed: int = 0, num_offloaded: int = 0, num_shelved: int = 0
) -> StepPlan:
    return StepPlan(
        rows_per_device=rows,
        gradient_accumulation=1,
        checkpointing=checkpointing,
        num_recomputed=num_recomputed,
        num_offloaded=num_offloaded,
        num_shelved=num_shelved,
    )


def plan_as(measured: dict) -> StepPlan:
    """The plan of a case of a baseline."""
    names = ("checkpointing", "num_recomputed", "num_offloaded", "num_shelved")
    return plan_of(measured["rows_per_device"], **{name: measured[name] for name in names if name in measured})


@pytest.mark.parametrize("measured", json.loads(BASELINE.read_text())["cases"], ids=lambda case: case["name"])
def test_gptoss20b_is_estimated_within_15_pct_of_the_measured_peak(measured: dict):
    spec = change(resolve("gptoss20b_lora_h100").train, measured["changes"])
    work = work_of(spec, measured["row_tokens"])
    estimate = sum(work.needs(plan_as(measured)).values()) / 1e9
    if "kernels" in measured:  # older ones, and the embedding was on the GPU
        estimate += embedding_bytes(work.shapes, work.config, work.spec) / 1e9
    assert estimate == pytest.approx(measured["peak_gpu_gb"], rel=0.15)


@pytest.mark.parametrize("measured", json.loads(BASELINE_110B.read_text())["cases"], ids=lambda case: case["name"])
def test_a_110b_base_in_nf4_is_estimated_within_10_pct_of_the_measured_peak(measured: dict):
    spec, hidden, inner = resolve("qwen110b_qlora_80gb").train, SHAPE["hidden_size"], SHAPE["intermediate_size"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {f"model.layers.{n}.{name}.weight": size for n in range(80) for name, size in sizes.items()}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (SHAPE["vocab_size"], hidden))
    work = Workload(
        shapes=shapes,
        config={"model_type": "qwen2", **SHAPE},
        spec=spec,
        targets=find_targets(shapes, spec.lora),
        row_tokens=measured["row_tokens"],
    )
    assert sum(work.needs(plan_as(measured)).values()) / 1e9 == pytest.approx(measured["peak_gpu_gb"], rel=0.1)


def test_each_knob_moves_its_part():
    spec = resolve("gptoss20b_lora_h100").train.model_copy(update={"kernels": "stock"})
    plain = work_of(spec).needs(plan_of(1, "full"))
    quantised = work_of(spec.model_copy(update={"quantization": "nf4"})).needs(plan_of(1, "full"))
    kept = work_of(spec).needs(plan_of(1, "none"))
    eager = work_of(spec.model_copy(update={"attention": "eager"})).needs(plan_of(1, "full"))
    assert 0.9 * plain["weights"] < quantised["weights"] < plain["weights"]  # the experts stay in bf16
    assert kept["activations"] > 5 * plain["activations"]
    assert eager["activations"] - plain["activations"] == 64 * 4096 * 4096 * 6
    assert plain["weights"] == 2 * 20_914_757_184  # the published parameter count


@pytest.mark.parametrize(
    ("room_gb", "plan"),
    [
        (141, plan_of(4, "none")),
        (84, plan_of(4, "none")),
        (70, plan_of(4, "offload")),
        (62, plan_of(2, "none")),
        (58, plan_of(2, "offload")),
        (53, plan_of(1, "none")),
        (51, plan_of(1, "offload")),
        (49, plan_of(1, "selective")),
        (47, plan_of(2, "full")),
        (10, plan_of(1, "full")),  # fits nowhere: the smallest, whose numbers the refusal says
    ],
)
def test_the_plan_is_the_fastest_that_fits(room_gb: float, plan: StepPlan):
    spec = change(resolve("gptoss20b_lora_h100").train, {**ALL_EXPERTS, "gradient_accumulation": 4})
    work = work_of(spec)
    found = plan_step(work, int(room_gb * 1e9))
    assert found.rows_per_device * found.gradient_accumulation == 4
    assert (found.rows_per_device, found.checkpointing) == (plan.rows_per_device, plan.checkpointing)


def test_gates_are_not_sent_to_a_host_that_has_no_room_for_them():
    """Of 16,384 tokens a gate is 0.75 GB, in a page of 1.07 GB: `auto` makes them again rather than to be refused."""
    work = work_of(change(resolve("gptoss20b_lora_h100").train, {**ALL_EXPERTS, "gradient_accumulation": 4}))
    room = 70 * 10**9
    for host_gb in (None, 40, 6, 1):
        host_room = host_gb and host_gb * 10**9
        plans = [plan_step(work, room, host_room)]
        while smaller := smaller_plan(work, plans[-1], host_room):
            plans.append(smaller)
        assert sum(work.needs(plans[0]).values()) < room and plans[-1].checkpointing == "full"
        shelved = [plan for plan in plans if plan.num_shelved]
        assert all(host_room is None or work.host_bytes(plan) <= host_room for plan in shelved)
        assert (plans[0].num_shelved > 0) == (host_gb in (None, 40))


@pytest.mark.parametrize("checkpointing", ["offload", "selective"])
@pytest.mark.parametrize("room", [None, 140 * 10**9])
def test_ways_to_save_memory_that_only_our_kernels_have_are_refused_without_them(checkpointing: str, room: int | None):
    """Else one of them was left out without a word, and the other ended in an IndexError."""
    spec = resolve("gptoss20b_lora_h100").train.model_copy(update={"checkpointing": checkpointing})
    dense = replace(work_of(spec), config={**work_of(spec).config, "model_type": "qwen2"})
    for work in (dense, work_of(spec.model_copy(update={"kernels": "stock"}))):
        with pytest.raises(SpecError, match=f"checkpointing = '{checkpointing}' is of our experts only"):
            plan_step(work, room)
    assert plan_step(work_of(spec), room).checkpointing == checkpointing


def shared_by(count: int) -> TrainSpec:
    changes = {**ALL_EXPERTS, "gradient_accumulation": 4, "num_processes": count, "parallel": "fsdp2"}
    return change(resolve("gptoss20b_lora_h100").train, changes)


def test_a_shared_base_fits_cards_that_the_whole_one_does_not():
    """gpt-oss-20b is 41.8 GB; a layer of it 1.65, its gate_up 1.06, embedding and head 2.32."""
    needs = work_of(shared_by(2)).needs(plan_of(1, "none"))
    assert needs["weights"] == 20_914_757_184  # half of two bytes each
    assert needs["gathered layers"] == pytest.approx((3 * 1.646 + 1.062 + 2.317) * 1e9, rel=1e-3)
    alone = work_of(shared_by(2).model_copy(update={"parallel": "ddp"}))
    room, plan = 44 * 10**9, plan_step(work_of(shared_by(2)), 44 * 10**9)
    assert sum(work_of(shared_by(2)).needs(plan).values()) < room
    assert sum(alone.needs(plan_step(alone, room)).values()) > room


def test_only_weights_that_are_unpacked_or_converted_are_copied_on_the_host():
    stored = {"model_type": "gpt_oss", "dtype": "bfloat16"}
    packed = {**stored, "quantization_config": {"quant_method": "mxfp4"}}
    shapes, spec = parameter_shapes(GPTOSS20B), shared_by(2)
    assert host_bytes(shapes, stored, spec) == 0
    assert host_bytes(shapes, packed, spec) == 2 * 2 * 20_914_757_184
    assert host_bytes(shapes, stored, spec.model_copy(update={"dtype": "float32"})) == 2 * 4 * 20_914_757_184
    assert host_bytes(shapes, packed, spec.model_copy(update={"parallel": "ddp"})) == 0


def test_a_host_that_can_not_hold_a_copy_for_each_process_is_refused(monkeypatch: pytest.MonkeyPatch):
    work = work_of(shared_by(4096))
    packed = replace(work, config={**work.config, "quantization_config": {"quant_method": "mxfp4"}})
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(85, 84)] * 4096)
    with pytest.raises(CapacityError, match=r"loading the base in each process needs about 171333\.\d GB of memory"):
        subject.require_training_memory(packed, plan_of(1, "full"))
    assert "of GPU memory" in subject.require_training_memory(work, plan_of(1, "full"))
    with pytest.raises(CapacityError, match=r"process, and the gate of 9 layers there .* checkpointing='selective'"):
        subject.require_training_memory(work, plan_of(1, "offload", num_shelved=9))
    with pytest.raises(CapacityError, match=r"host, and the gate of 9 layers there .* checkpointing='selective'"):
        subject.require_training_memory(work, plan_of(1, "offload", num_offloaded=1, num_shelved=9))


def test_without_a_gpu_nothing_is_chosen():
    spec = resolve("gptoss20b_lora_h100").train
    assert plan_step(work_of(spec), None) == StepPlan(rows_per_device=1, gradient_accumulation=4, checkpointing="none")


def test_after_an_out_of_memory_the_rows_of_a_step_stay_and_each_plan_needs_less():
    work = work_of(change(resolve("gptoss20b_lora_h100").train, {**ALL_EXPERTS, "gradient_accumulation": 6}))
    plans = [plan_step(work, int(400e9))]
    while smaller := smaller_plan(work, plans[-1]):
        plans.append(smaller)
    assert [plan.rows_per_device for plan in plans[:3]] == [6, 3, 1]
    assert all(plan.rows_per_device * plan.gradient_accumulation == 6 for plan in plans)
    needed = [sum(work.needs(plan).values()) for plan in plans]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    assert plans[-1].checkpointing == "full"


def gpu(total_gb: float, free_gb: float) -> machine.Gpu:
    return machine.Gpu(name="NVIDIA H100", total_bytes=int(total_gb * 1e9), free_bytes=int(free_gb * 1e9))


def test_a_gpu_that_is_too_small_or_busy_is_said_with_numbers(monkeypatch: pytest.MonkeyPatch):
    """The GPUs of another machine: nvidia-smi is not ours."""
    spec = resolve("gptoss20b_lora_h100").train
    work, plan = work_of(spec), plan_of(1, "full")
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(85, 84)])
    assert "84.0 GB of the NVIDIA H100 are free" in subject.require_training_memory(work, plan)
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(85, 12)])
    with pytest.raises(
        CapacityError, match=r"weights 40\.7.* but 12\.0 of 85\.0 GB .*free the 73\.0 GB .*`tatara serv"
    ):
        subject.require_training_memory(work, plan)
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(24, 23.5)])
    with pytest.raises(CapacityError, match=r"23\.5 of 24\.0 GB of the NVIDIA H100 are free: lower TrainSpec"):
        subject.require_training_memory(work, plan)
    with pytest.raises(CapacityError, match=r"num_processes = 2 but this machine has 1 GPUs"):
        subject.require_training_memory(work_of(spec.model_copy(update={"num_processes": 2})), plan)
    monkeypatch.setattr(machine, "list_gpus", list)
    with pytest.raises(CapacityError, match=r"there is no GPU and \d+\.\d GB of memory are available: use a machine"):
        subject.require_training_memory(work, plan_of(10**6, "none"))


def test_experts_that_no_grouped_gemm_can_multiply_are_refused_before_training():
    """torch says "strides should be multiple of 16 bytes", in the middle of the first step."""
    spec = resolve("gptoss20b_lora_h100").train
    odd = {"model_type": "gpt_oss", "hidden_size": 36, "intermediate_size": 32}
    with pytest.raises(SpecError, match=r"\{'hidden_size': 36\}, but in bfloat16 .* multiples of 8 only"):
        require_aligned(odd, spec)
    require_aligned(odd, spec.model_copy(update={"dtype": "float32"}))
    require_aligned({**odd, "model_type": "qwen2"}, spec)


def test_parts_of_no_size_are_not_said():
    assert say_needs({"weights": 2 * 10**9, "experts": 0}) == "2.0 GB (weights 2.0)"
