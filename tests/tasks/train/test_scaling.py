"""What gpt-oss-120b needs, as docs/scaling.md says it: computed by the estimator that the measured points hold."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from flows.recipes import resolve
from tasks.costs import peak_flops
from tasks.gptoss.layout import config_values, parameter_shapes
from tasks.specs import TrainSpec, change
from tasks.targets import find_targets
from tasks.train.duration import step_seconds
from tasks.train.needs import embedding_bytes, host_bytes
from tasks.train.plan import StepPlan, Workload, plan_step
from tests.tasks.train.test_needs import ALL_EXPERTS, BASELINE, BASELINES, GPTOSS20B, plan_as, work_of

BASELINE_120B = BASELINES / "train_lora_120b_h200.json"
DOC = Path(__file__).resolve().parents[3] / "docs/scaling.md"
GPTOSS120B = GPTOSS20B.model_copy(update={"num_layers": 36, "num_experts": 128})
SHAPES = parameter_shapes(GPTOSS120B)
ADAPTERS = {"three layers": {}, "all experts": ALL_EXPERTS}


def work_120b(changes: dict[str, object], num_gpus: int) -> Workload:
    parallel = "fsdp2" if num_gpus > 1 else "ddp"
    shared = {"num_processes": num_gpus, "parallel": parallel, "gradient_accumulation": 4}
    spec = change(resolve("gptoss120b_lora_8x80gb").train, {**changes, **shared})
    return Workload(
        shapes=SHAPES,
        config={"model_type": "gpt_oss", **config_values(GPTOSS120B)},
        spec=spec,
        targets=find_targets(SHAPES, spec.lora),
        row_tokens=4096,
        document_tokens=4096,
    )


def cell(work: Workload, room_gb: int) -> str:
    plan = plan_step(work, room_gb * 10**9)
    needed = sum(work.needs(plan).values()) / 1e9
    if needed > room_gb:
        return f"no: {needed:.0f} GB at least"
    rows = f"{plan.rows_per_device} row{'s' if plan.rows_per_device > 1 else ''} a pass"
    again = {"none": "", "full": ", layers again"}.get(plan.checkpointing, f", the gate of {plan.num_recomputed} again")
    return f"{needed:.0f} GB ({rows}{again})"


def table() -> list[str]:
    lines = ["| adapter | GPUs | 80 GB each | 141 GB each |", "|---|---:|---|---|"]
    for adapter, changes in ADAPTERS.items():
        for count in (1, 2, 4, 8, 16):
            work = work_120b(changes, count)
            lines.append(f"| {adapter} | {count} | {cell(work, 80)} | {cell(work, 141)} |")
    return lines


def test_the_table_of_the_document_is_what_the_estimator_says():
    lines = table()
    assert "\n".join(lines) in DOC.read_text(), "put this into docs/scaling.md:\n" + "\n".join(lines)


def test_the_shapes_are_those_of_the_published_model():
    assert sum(map(prod, SHAPES.values())) == 116_829_156_672


def test_what_the_document_says_of_the_host_and_of_one_copy_each():
    work = work_120b({}, 8)
    packed = {**work.config, "quantization_config": {"quant_method": "mxfp4"}}
    copies, alone = host_bytes(SHAPES, packed, work.spec), work_120b({}, 1)
    alone = replace(alone, spec=change(alone.spec, {"num_processes": 2}))  # DDP: each has all of it
    least = StepPlan(rows_per_device=1, gradient_accumulation=4, checkpointing="full")
    text = DOC.read_text()
    assert f"{copies / 1e9:,.0f} GB of host memory" in text
    assert f"{sum(alone.needs(least).values()) / 1e9:.0f} GB on each GPU" in text
    nf4 = alone.spec.model_copy(update={"quantization": "nf4"})
    assert f"{sum(replace(alone, spec=nf4).needs(least).values()) / 1e9:.0f} GB with nf4" in text


@pytest.mark.parametrize("case", json.loads(BASELINE_120B.read_text())["cases"], ids=lambda case: case["name"])
def test_120b_on_one_gpu_is_estimated_as_it_was_measured(case: dict):
    spec = resolve("gptoss120b_lora_80gb").train
    stored = {**work_120b({}, 1).config, "quantization_config": {"quant_method": "mxfp4"}}
    targets = find_targets(SHAPES, spec.lora)
    work = Workload(shapes=SHAPES, config=stored, spec=spec, targets=targets, row_tokens=4096, document_tokens=4096)
    plan = plan_as(case)
    seconds = step_seconds(work, plan, peak_flops("NVIDIA H200"))
    assert work.num_trainable == case["num_trainable"] and seconds
    table = embedding_bytes(SHAPES, stored, spec)  # it was on the GPU when this was measured
    assert (sum(work.needs(plan).values()) + table) / 1e9 == pytest.approx(case["peak_gpu_gb"], rel=0.1)
    assert case["rows_per_device"] * case["row_tokens"] / seconds == pytest.approx(case["tokens_per_s"], rel=0.15)


@pytest.mark.parametrize(("name", "one"), [("all-experts-2-gpus", 28_104), ("all-experts-2-gpus-fsdp2", 26_991)])
def test_two_gpus_are_estimated_as_they_were_measured(name: str, one: int):
    (case,) = [case for case in json.loads(BASELINE.read_text())["cases"] if case["name"] == name]
    spec: TrainSpec = change(resolve("gptoss20b_lora_h100").train, case["changes"])
    plan = StepPlan(rows_per_device=4, gradient_accumulation=1, checkpointing="none")
    estimate = sum(work_of(spec).needs(plan).values()) / 1e9
    assert estimate == pytest.approx(case["peak_gpu_gb"], rel=0.1)
    assert f"| {case['peak_gpu_gb']:.1f} GB | {estimate:.1f} GB |" in DOC.read_text(), f"{estimate:.1f}"
    speed = case["tokens_per_s"]
    assert f"{speed:,} tokens/s ({speed / one:.2f} times one" in DOC.read_text(), speed / one
