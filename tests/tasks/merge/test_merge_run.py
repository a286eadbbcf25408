"""A merge that is killed leaves nothing of its torn shard, and a base that changed is not merged into."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks import files
from tasks.artifacts import ArtifactStore, FetchedDataset, PackedDataset, TrainedAdapter
from tasks.errors import CorruptError, MissingError
from tasks.merge import run as subject
from tasks.specs import BaseModelSpec, FetchSpec, LoraSpec, MergeSpec, PackSpec, TrainSpec
from tasks.train.run import find_adapter
from tests.tasks.publish.conftest import _commit
from tests.tiny import SHAPE, make_base, save_model

SPEC = MergeSpec(shard_bytes=1_000_000)


def make_adapter(store: ArtifactStore, folder: Path) -> TrainedAdapter:
    """An adapter on q_proj of both layers, committed with its lineage; nothing is trained."""
    base = make_base(store, folder / "base")
    rows = {"num_train_rows": 8, "num_validation_rows": 2}
    data = {**rows, "source": "shipped", "revision": "a" * 64, "is_chat": True, "num_rejected_rows": 0}
    dataset = _commit(store, FetchedDataset, FetchSpec(source="shipped"), (), **data)
    counts = {"num_train_documents": 8, "num_validation_documents": 2, "num_train_tokens": 9, "num_learnt_tokens": 3}
    packed = _commit(store, PackedDataset, PackSpec(), (dataset,), **rows, **counts, row_tokens=128, fill_pct=90.0)
    queries = SHAPE.num_attention_heads * SHAPE.head_dim
    torch.manual_seed(0)
    tensors = {}
    for layer in range(SHAPE.num_layers):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, SHAPE.hidden_size)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(queries, 4)
    (folder / "adapter").mkdir()
    save_file(tensors, str(folder / "adapter" / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    losses = {"first_loss": 3.0, "last_loss": 2.0, "validation_loss_before": 3.0, "validation_loss_after": 2.0}
    places = {"adapter_folder": str(folder / "adapter"), "adapter_digest": "d" * 64}
    origin = {"base_folder": base.model_folder, "base_digest": base.model_digest, "num_steps": 1, "num_trainable": 64}
    spec = TrainSpec(lora=LoraSpec(rank=4, alpha=8, target_modules=("q_proj",)))
    return _commit(store, TrainedAdapter, spec, (packed, base), **losses, **places, **origin)


def merge_until_killed(adapter: TrainedAdapter, store: ArtifactStore, num_writes: int) -> None:
    """Merge in a process that dies by SIGKILL inside a shard, after so many writes to it."""
    pid = os.fork()
    if pid == 0:
        put, left = subject._put, [num_writes]

        def put_until_killed(handle, hasher, data):
            left[0] -= 1
            if left[0] < 0:
                handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            put(handle, hasher, data)

        subject._put = put_until_killed
        subject.merge_adapter(adapter, SPEC, store)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_inside_a_shard_the_merge_ends_with_the_same_files(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    for num_writes in (3, 20):
        merge_until_killed(adapter, store, num_writes)
    strays = list((store.root / "merged").rglob(".*.tmp"))
    assert strays and store.committed(subject.MergedModel) == []
    merged = subject.merge_adapter(adapter, SPEC, store)
    (tmp_path / "again").mkdir()
    other = ArtifactStore(tmp_path / "again" / "home")
    whole = subject.merge_adapter(make_adapter(other, tmp_path / "again"), SPEC, other)
    assert merged.model_digest == whole.model_digest
    assert files.list_files(Path(merged.model_folder)) == files.list_files(Path(whole.model_folder))
    assert not list((store.root / "merged").rglob(".*.tmp"))


def test_a_base_that_changed_or_went_is_not_merged_into(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    weights = Path(adapter.base_folder) / "model.safetensors"
    os.utime(weights)  # touched, the same bytes: the digest tells
    subject.merge_adapter(adapter, SPEC, store)
    save_model(Path(adapter.base_folder), seed=5)
    with pytest.raises(CorruptError, match=rf"base at .*/base is not the one that adapter {adapter.short} was trained"):
        subject.merge_adapter(adapter, SPEC.model_copy(update={"shard_bytes": 2_000_000}), store)
    weights.parent.rename(tmp_path / "moved")
    with pytest.raises(MissingError, match=r"was at .*/base and is gone: bring it back, or train again"):
        subject.merge_adapter(adapter, SPEC.model_copy(update={"shard_bytes": 2_000_000}), store)


def test_a_finished_merge_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after the last rename: only the manifest lacks, and a full disk is no reason to refuse it."""
    store = ArtifactStore(tmp_path / "home")
    merged = subject.merge_adapter(make_adapter(store, tmp_path), SPEC, store)
    (merged.path / "manifest.json").unlink()
    monkeypatch.setattr(files, "free_bytes", lambda path: 10_000_000)
    assert subject.merge_adapter(store.committed(TrainedAdapter)[0], SPEC, store) == merged


def test_latest_is_the_newest_adapter_of_the_recipes_base(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    assert find_adapter("latest", BaseModelSpec(model=str(tmp_path / "base")), store) == adapter
    with pytest.raises(MissingError, match=r"no adapter 'latest' of openai/gpt-oss-20b below .*; there are: none"):
        find_adapter("latest", BaseModelSpec(model="openai/gpt-oss-20b"), store)
    assert find_adapter(adapter.short, BaseModelSpec(model="openai/gpt-oss-20b"), store) == adapter
