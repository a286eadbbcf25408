"""Two processes on one machine train what one trains: the CPU twin (gloo) of two GPUs."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.artifacts import ArtifactStore
from tasks.metrics import read_metrics
from tasks.train.run import train_adapter
from tests.tasks.train.runs import SPEC, make_artifacts


@pytest.mark.chaos
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(tmp_path: Path, parallel: str):
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    one = SPEC.model_copy(update={"max_steps": 6, "rows_per_device": 2, "save_steps": 6})
    two = one.model_copy(update={"rows_per_device": 1, "num_processes": 2, "parallel": parallel})
    adapters = [train_adapter(packed, base, spec, store, lambda record: None) for spec in (one, two)]
    losses = [[record["loss"] for record in read_metrics(adapter.path / "metrics.jsonl")] for adapter in adapters]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    tensors = [load_file(f"{adapter.adapter_folder}/adapter_model.safetensors") for adapter in adapters]
    for name, tensor in tensors[0].items():
        assert (tensors[1][name] - tensor).norm() < 1e-3 * tensor.norm(), name
    assert adapters[1].validation_loss_after == pytest.approx(adapters[0].validation_loss_after, abs=1e-3)
