"""A merged model with its whole lineage, committed by hand: training one would take a minute."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.artifacts import (
    Artifact,
    ArtifactStore,
    BaseCheckpoint,
    FetchedDataset,
    MergedModel,
    PackedDataset,
    TrainedAdapter,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.specs import FetchSpec, LoraSpec, MergeSpec, PackSpec, Spec, TrainSpec
from tests.hub_server import hub_fixture  # noqa: F401  (the fixture `hub`)

MADE = {"README.md", "recipe.json", "loss_curve.png"}  # what publishing adds to the model's files
_LORA = LoraSpec(rank=4, alpha=8, target_parameters=("mlp.experts.down_proj",))


def write_shard(path: Path, values: bytes) -> None:
    """Write one safetensors file with one uint8 tensor `w`."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


def write_model(folder: Path, first: int = 0) -> None:
    """Write two shards, their index, and the small files of a model folder."""
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for number, name in enumerate(shards):
        write_shard(folder / name, bytes((first + number + i) % 251 for i in range(20_000)))
    index = {"metadata": {"total_size": 40_000}, "weight_map": {"w1": shards[0], "w2": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "gpt_oss"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merge_ledger.json").write_text("[]")


def make_merged(
    store: ArtifactStore,
    write: Callable[[Path], object] = write_model,
    adapt: Callable[[Path], object] | None = None,
    source: str = "shipped",
) -> MergedModel:
    """Commit data set, packed rows, base, adapter (`adapt` writes its files) and a merged model (`write` does)."""
    rows = {"num_train_rows": 8, "num_validation_rows": 2}
    dataset = _commit(
        store,
        FetchedDataset,
        FetchSpec(source=source),
        (),
        **rows,
        source=source,
        revision="a" * 64,
        is_chat=True,
        num_rejected_rows=0,
    )
    counts = {
        "num_train_documents": 8,
        "num_validation_documents": 2,
        "num_train_tokens": 900,
        "num_learnt_tokens": 300,
    }
    packed = _commit(store, PackedDataset, PackSpec(), (dataset,), **rows, **counts, row_tokens=128, fill_pct=90.0)
    base_folder = store.root / "a-base"
    base_folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (base_folder / name).write_text("{}")
    base = _commit(
        store,
        BaseCheckpoint,
        MergeSpec(),
        (),
        model_folder=str(base_folder),
        origin="ada/base@" + "b" * 40,
        model_digest="c" * 64,
        num_parameters=40_000,
    )
    losses = {"first_loss": 3.0, "last_loss": 2.0, "validation_loss_before": 3.1, "validation_loss_after": 2.2}
    adapter = _commit(
        store,
        TrainedAdapter,
        TrainSpec(lora=_LORA),
        (packed, base),
        lambda folder: write_adapter(folder, adapt),
        **losses,
        adapter_digest="d" * 64,
        base_folder=str(base_folder),
        base_digest="c" * 64,
        num_steps=10,
        num_trainable=64,
    )
    with store.claim(MergedModel, make_key("merge", 1, MergeSpec(), {}, (adapter,))) as claim:
        model = claim.folder / "model"
        model.mkdir()
        write(model)
        merged = MergedModel(
            key=claim.key,
            folder=str(claim.folder),
            parents=(adapter.ref,),
            model_folder=str(model),
            model_digest=folder_digest(digest_files(model)),
            base_folder=str(base_folder),
            num_tensors=2,
            num_changed=1,
            num_shards=2,
            total_bytes=40_000,
        )
        return claim.commit(merged, spec=MergeSpec())


def write_adapter(folder: Path, adapt: Callable[[Path], object] | None) -> dict[str, str]:
    """Write what training leaves: the adapter as PEFT stores it, and its metrics."""
    (folder / "adapter").mkdir(exist_ok=True)
    write_shard(folder / "adapter" / "adapter_model.safetensors", bytes(range(200)))
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "/home/ada/private/base", "revision": None}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "README.md").write_text("what PEFT says")
    if adapt:
        adapt(folder / "adapter")
    lines = [json.dumps({"step": step, "num_steps": 10, "loss": 3.0 - step / 10}) for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {"adapter_folder": str(folder / "adapter")}


def _commit(
    store: ArtifactStore,
    cls: type[Artifact],
    spec: Spec,
    parents: tuple[Artifact, ...],
    write: Callable[[Path], dict[str, str]] = lambda folder: {},
    **values: object,
) -> Artifact:
    with store.claim(cls, make_key(cls.kind, 1, spec, {}, parents)) as claim:
        if claim.found:
            return claim.found
        refs = tuple(parent.ref for parent in parents)
        values |= write(claim.folder)
        artifact = cls.model_validate({"key": claim.key, "folder": str(claim.folder), "parents": refs, **values})
        return claim.commit(artifact, spec=spec)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def merged(store: ArtifactStore) -> MergedModel:
    """A merged model of two shards, 40 kB."""
    return make_merged(store)
