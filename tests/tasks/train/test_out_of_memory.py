"""A step that does not fit is cut into smaller passes, and the run goes on from its last whole step."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.artifacts import ArtifactStore
from tasks.errors import OutOfMemoryError
from tasks.metrics import read_metrics
from tasks.train import run as subject
from tests.tasks.train.runs import SPEC, make_artifacts

SHORT = "tests.tasks.train.short_of_memory"


@pytest.mark.chaos
def test_it_goes_on_with_half_the_rows_of_a_pass_and_the_same_rows_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = SPEC.model_copy(update={"max_steps": 8})
    store = ArtifactStore(tmp_path / "whole")
    packed, base = make_artifacts(store, tmp_path)
    whole = subject.train_adapter(packed, base, spec, store, lambda record: None)
    store = ArtifactStore(tmp_path / "short")
    monkeypatch.setattr(subject, "TRAINER", SHORT)
    short = subject.train_adapter(packed, base, spec, store, lambda record: None)
    assert short.key == whole.key
    assert "resuming from checkpoint-5" in (short.path / "output.log").read_text()
    manifest = store.manifest(type(short), short.key)
    assert manifest
    first, second = manifest["about"]["plans"]
    assert first.startswith("1 passes of 2 x 128 tokens") and second.startswith("2 passes of 1 x 128 tokens")
    losses = [[r["loss"] for r in read_metrics(adapter.path / "metrics.jsonl")] for adapter in (short, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    tensors = [load_file(f"{adapter.adapter_folder}/adapter_model.safetensors") for adapter in (short, whole)]
    for name, tensor in tensors[0].items():
        assert (tensor - tensors[1][name]).norm() < 1e-2 * tensors[1][name].norm(), name


@pytest.mark.chaos
def test_a_run_that_may_not_choose_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    monkeypatch.setattr(subject, "TRAINER", SHORT)
    spec = SPEC.model_copy(update={"max_steps": 8, "fit_micro_batch": False})
    with pytest.raises(OutOfMemoryError, match="the GPU ran out of memory: CUDA out of memory"):
        subject.train_adapter(packed, base, spec, store, lambda record: None)
