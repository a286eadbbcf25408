"""The estimate of a step's time, held against what was measured on a GPU."""

import json
from dataclasses import replace

import pytest

from flows.recipes import resolve
from tasks.costs import peak_flops
from tasks.specs import change
from tasks.train.duration import step_seconds
from tests.tasks.train.test_needs import BASELINE, plan_as, plan_of, work_of

MEASURED = json.loads(BASELINE.read_text())
FUSED = [case for case in MEASURED["cases"] if case["changes"].get("kernels") != "stock"]


@pytest.mark.parametrize("measured", FUSED, ids=lambda case: case["name"])
def test_it_is_within_15_pct_of_the_measured_time(measured: dict):
    work = work_of(change(resolve("gptoss20b_lora_h100").train, measured["changes"]), measured["row_tokens"])
    plan = plan_as(measured)
    if "cuDNN" not in measured["attention"]:  # measured before whole rows went there
        work = replace(work, document_tokens=measured["row_tokens"] - 1)
    seconds = step_seconds(work, plan, peak_flops(MEASURED["machine"]))
    assert seconds
    tokens_per_s = measured["rows_per_device"] * measured["row_tokens"] / seconds
    each = measured["tokens_per_s"] / measured["changes"].get("num_processes", 1)
    assert tokens_per_s == pytest.approx(each, rel=0.15)


def test_an_unknown_card_or_kernel_is_not_guessed():
    work = work_of(resolve("gptoss20b_lora_h100").train)
    stock = work_of(resolve("gptoss20b_lora_h100", {"train": {"kernels": "stock"}}).train)
    assert step_seconds(work, plan_of(1, "none"), peak_flops("a processor")) is None
    assert step_seconds(stock, plan_of(1, "full"), peak_flops("NVIDIA H200")) is None
