"""Real training of a tiny gpt-oss by the real worker process, killed and resumed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks import processes
from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter, digest_files
from tasks.checkpoints import checkpoint_step, is_complete, latest_checkpoint, mark_complete
from tasks.errors import SpecError, TrainingError
from tasks.merge.run import merge_adapter
from tasks.metrics import read_metrics
from tasks.specs import MergeSpec
from tasks.train.run import _read_plans, available_processes, train_adapter
from tests.tasks.train.runs import LORA, SPEC, make_artifacts

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, TrainedAdapter]:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained")
    store = ArtifactStore(folder / "home")
    packed, base = make_artifacts(store, folder)
    return store, train_adapter(packed, base, SPEC, store, lambda record: None)


def test_loss_falls_on_train_and_validation(trained: tuple[ArtifactStore, TrainedAdapter]):
    _, adapter = trained
    assert adapter.num_steps == 24
    assert adapter.last_loss < adapter.first_loss - 0.1
    assert adapter.validation_loss_after < adapter.validation_loss_before - 0.1


def test_every_target_of_every_layer_moved(trained: tuple[ArtifactStore, TrainedAdapter]):
    _, adapter = trained
    tensors = load_file(str(Path(adapter.adapter_folder) / "adapter_model.safetensors"))
    b_matrices = {name: tensor for name, tensor in tensors.items() if ".lora_B." in name}
    assert len(b_matrices) == 2 * (2 + 2)  # layers x (attention + experts)
    assert all(tensor.abs().max() > 0 for tensor in b_matrices.values())
    config = json.loads((Path(adapter.adapter_folder) / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_a_second_call_is_skipped(trained: tuple[ArtifactStore, TrainedAdapter]):
    store, adapter = trained
    base = store.ancestor(adapter, BaseCheckpoint)
    packed = store.ancestor(adapter, PackedDataset)
    before = (adapter.path / "manifest.json").stat().st_mtime_ns
    assert train_adapter(packed, base, SPEC, store, lambda record: None) == adapter
    assert (adapter.path / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(trained: tuple[ArtifactStore, TrainedAdapter], tmp_path: Path):
    """SIGKILL of the trainer after a few steps, a torn checkpoint beside it; the rest must match to the bit."""
    _, whole = trained
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    killed = threading.Event()

    def kill_after_five_steps(record: dict[str, float]) -> None:
        if record["step"] >= 5 and not killed.is_set():
            killed.set()
            folder = next((store.root / "adapter").glob("*/process.json"))
            os.killpg(json.loads(folder.read_text())["pid"], signal.SIGKILL)

    with pytest.raises(TrainingError, match="died without a result"):
        train_adapter(packed, base, SPEC, store, kill_after_five_steps)
    folder = next((store.root / "adapter").glob("[!.]*"))
    torn = folder / "checkpoints" / "checkpoint-39"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 39')
    assert 4 <= checkpoint_step(latest_checkpoint(folder / "checkpoints")) < 24
    assert not torn.exists()

    resumed = train_adapter(packed, base, SPEC, store, lambda record: None)
    assert "resuming from checkpoint-" in (folder / "output.log").read_text()
    assert [r["loss"] for r in read_metrics(folder / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(whole.path / "metrics.jsonl")
    ]
    mine, theirs = digest_files(Path(resumed.adapter_folder)), digest_files(Path(whole.adapter_folder))
    assert mine["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]


@pytest.mark.slow
def test_a_trainer_whose_parent_died_is_found_again(tmp_path: Path):
    """The parent is killed; the trainer goes on; the next try follows it instead of starting another."""
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    spec = SPEC.model_copy(update={"max_steps": 40, "save_steps": 20, "log_steps": 50})
    pid = os.fork()
    if pid == 0:  # the parent that will be killed
        try:
            train_adapter(packed, base, spec, store, lambda record: None)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not list((store.root / "adapter").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    identity_file = next((store.root / "adapter").glob("*/process.json"))
    survivor = processes.find_alive(identity_file)
    assert survivor is not None
    adapter = train_adapter(packed, base, spec, store, lambda record: None)
    assert json.loads(identity_file.read_text())["pid"] == survivor.pid
    assert adapter.num_steps == 40
    steps = [record["step"] for record in read_metrics(adapter.path / "metrics.jsonl")]
    assert steps == [1, 40]  # log_steps exceeds the run: its first and last step are logged all the same


def test_a_target_that_hits_nothing_is_named_before_anything_starts(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    lora = LORA.model_copy(update={"target_modules": ("q_proj", "qkv_proj")})
    with pytest.raises(SpecError, match=r"'qkv_proj' hits nothing.*q_proj"):
        train_adapter(packed, base, SPEC.model_copy(update={"lora": lora}), store, lambda record: None)
    assert not list((store.root / "adapter").glob("*/process.json"))


def test_checkpoints_go_when_the_adapter_is_whole(trained: tuple[ArtifactStore, TrainedAdapter]):
    """They are no part of the artifact: freeing disk by hand must not make it look damaged."""
    store, adapter = trained
    assert not (adapter.path / "checkpoints").exists()
    (adapter.path / "output.log").write_text("a last word of the trainer")
    assert store.find(TrainedAdapter, adapter.key) == adapter


def test_a_checkpoint_is_whole_only_with_all_its_files(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name)
    assert not is_complete(checkpoint)
    mark_complete(checkpoint)
    assert is_complete(checkpoint)
    (checkpoint / "optimizer.pt").unlink()  # Trainer would resume without a word, with a fresh optimizer
    assert not is_complete(checkpoint)


def test_a_warm_up_as_long_as_the_run_is_refused(trained: tuple[ArtifactStore, TrainedAdapter]):
    store, adapter = trained
    packed, base = store.ancestor(adapter, PackedDataset), store.ancestor(adapter, BaseCheckpoint)
    spec = SPEC.model_copy(update={"max_steps": -1, "num_epochs": 1.0, "warmup_steps": 100})
    with pytest.raises(SpecError, match=r"warmup_steps = 100 but the run has \d+ optimizer steps \(\d+ packed rows\)"):
        train_adapter(packed, base, spec, store, lambda record: None)


@pytest.mark.parametrize("written", ['[{"rows_per', '[{"rows_per_device": 2, "of another version": 1}]', "{}", "7"])
def test_plans_that_can_not_be_read_are_made_again(tmp_path: Path, written: str):
    (tmp_path / "plans.json").write_text(written)
    assert _read_plans(tmp_path / "plans.json") == []
    (tmp_path / "plans.json").unlink()
    assert _read_plans(tmp_path / "plans.json") == []


def test_a_number_of_processes_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch):
    for said in ("two", "-1", "1.5"):
        monkeypatch.setenv("TATARA_TRAIN_PROCESSES", said)
        with pytest.raises(SpecError, match=f"TATARA_TRAIN_PROCESSES is '{said}', expected a number"):
            available_processes(SPEC)


def test_merged_equals_peft(trained: tuple[ArtifactStore, TrainedAdapter]):
    """In float32 our streaming merge differs from PEFT's merge_and_unload in no element, in bf16 neither."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    store, adapter = trained
    for dtype in ("float32", "bfloat16"):
        merged = merge_adapter(adapter, MergeSpec(dtype=dtype, shard_bytes=1_000_000), store)
        base = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, adapter.adapter_folder).merge_and_unload().state_dict()
        ours = AutoModelForCausalLM.from_pretrained(merged.model_folder, dtype=getattr(torch, dtype)).state_dict()
        assert ours.keys() == theirs.keys()
        differing = sum(int((ours[n] != theirs[n].to(ours[n].dtype)).sum()) for n in ours)
        assert differing == 0
        assert merged.num_changed == 8
        untouched = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32).state_dict()
        changed = {n for n in ours if not torch.equal(ours[n], untouched[n].to(ours[n].dtype))}
        assert len(changed) == 8
