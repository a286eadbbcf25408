"""The estimate of a training step's memory, held against peaks that were measured on a GPU."""

import json
from pathlib import Path

import pytest

from flows.recipes import resolve
from tasks import machine
from tasks.errors import CapacityError
from tasks.gptoss.layout import config_values, parameter_shapes
from tasks.specs import GptOssShape, TrainSpec, change
from tasks.train import run as subject
from tasks.train.needs import say_needs, training_needs
from tasks.train.targets import find_targets

BASELINE = Path(__file__).resolve().parents[2] / "bench/baselines/train_gptoss20b_h200.json"
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


def needs_of(spec: TrainSpec, tokens: int) -> dict[str, int]:
    shapes = parameter_shapes(GPTOSS20B)
    return training_needs(shapes, config_values(GPTOSS20B), spec, find_targets(shapes, spec.lora), tokens)


@pytest.mark.parametrize(
    ("changes", "rows", "peak_gb"),
    [
        ({}, 1, json.loads(BASELINE.read_text())["peak_gpu_gb"]),
        (ALL_EXPERTS, 4, 52.0),  # facts.md 2: PEFT, all 24 layers, Liger, batch 4
    ],
)
def test_gptoss20b_is_estimated_within_a_tenth_of_the_measured_peak(changes: dict, rows: int, peak_gb: float):
    spec = change(resolve("gptoss20b_lora_h100").train, changes)
    assert sum(needs_of(spec, 4096 * rows).values()) / 1e9 == pytest.approx(peak_gb, rel=0.1)


def test_each_knob_moves_its_part():
    spec = resolve("gptoss20b_lora_h100").train
    plain = needs_of(spec, 4096)
    quantised = needs_of(spec.model_copy(update={"quantization": "nf4"}), 4096)
    kept = needs_of(spec.model_copy(update={"gradient_checkpointing": False}), 4096)
    eager = needs_of(spec.model_copy(update={"attention": "eager"}), 4096)
    assert 0.9 * plain["weights"] < quantised["weights"] < plain["weights"]  # the experts stay in bf16
    assert kept["activations"] > 5 * plain["activations"]
    assert eager["activations"] - plain["activations"] == 64 * 4096 * 4096 * 6
    assert plain["weights"] == 2 * 20_914_757_184  # the published parameter count


def gpu(total_gb: float, free_gb: float) -> machine.Gpu:
    return machine.Gpu(name="NVIDIA H100", total_bytes=int(total_gb * 1e9), free_bytes=int(free_gb * 1e9))


def test_a_gpu_that_is_too_small_or_busy_is_said_with_numbers(monkeypatch: pytest.MonkeyPatch):
    """The GPUs of another machine: nvidia-smi is not ours."""
    spec = resolve("gptoss20b_lora_h100").train
    needs = needs_of(spec, 4096)
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(85, 84)])
    assert "84.0 GB of the NVIDIA H100 are free" in subject.require_training_memory(needs, spec)
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(85, 12)])
    with pytest.raises(
        CapacityError, match=r"weights 41\.8.* but 12\.0 of 85\.0 GB .*free the 73\.0 GB .*`tatara serv"
    ):
        subject.require_training_memory(needs, spec)
    monkeypatch.setattr(machine, "list_gpus", lambda: [gpu(24, 23.5)])
    with pytest.raises(CapacityError, match=r"23\.5 of 24\.0 GB of the NVIDIA H100 are free: lower TrainSpec"):
        subject.require_training_memory(needs, spec)
    with pytest.raises(CapacityError, match=r"num_processes = 2 but this machine has 1 GPUs"):
        subject.require_training_memory(needs, spec.model_copy(update={"num_processes": 2}))
    monkeypatch.setattr(machine, "list_gpus", list)
    with pytest.raises(CapacityError, match=r"there is no GPU and \d+\.\d GB of memory are available: use a machine"):
        subject.require_training_memory({"weights": 10**15}, spec)


def test_parts_of_no_size_are_not_said():
    assert say_needs({"weights": 2 * 10**9, "experts": 0}) == "2.0 GB (weights 2.0)"
