"""Artifacts from adapter to served model, committed without the work behind them: for tests of what reads them."""

from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from tasks.artifacts import (
    Artifact,
    ArtifactStore,
    BaseCheckpoint,
    MergedModel,
    PackedDataset,
    PublishedModel,
    ServedModel,
    TrainedAdapter,
)
from tasks.specs import ServeSpec

A = TypeVar("A", bound=Artifact)


def names(store: ArtifactStore, cls: type[Artifact], seed: str, *parents: Artifact) -> dict[str, Any]:
    """Key, folder and parents of an artifact; its key follows from kind and seed."""
    key = sha256(f"{cls.kind}{seed}".encode()).hexdigest()
    return {"key": key, "folder": str(store.folder(cls, key)), "parents": tuple(parent.ref for parent in parents)}


def commit(store: ArtifactStore, artifact: A, about: dict[str, Any] | None = None) -> A:
    """Write its manifest; one that is there already is returned."""
    with store.claim(type(artifact), artifact.key) as claim:
        return claim.found or claim.commit(artifact, spec=ServeSpec(max_model_len=512), about=about)


def commit_base(store: ArtifactStore, seed: str = "base") -> BaseCheckpoint:
    values = {"model_folder": "/models/base", "origin": "owner/base@1", "model_digest": seed * 4, "num_parameters": 1}
    return commit(store, BaseCheckpoint(**names(store, BaseCheckpoint, seed), **values))


def commit_packed(
    store: ArtifactStore, dataset: Artifact, base: Artifact, seed: str = "packed", about: dict[str, Any] | None = None
) -> PackedDataset:
    counts = dict.fromkeys(
        ("row_tokens", "num_train_rows", "num_validation_rows", "num_train_documents", "num_validation_documents"), 8
    )
    more = {"num_train_tokens": 64, "num_learnt_tokens": 32, "fill_pct": 99.0}
    return commit(store, PackedDataset(**names(store, PackedDataset, seed, dataset, base), **counts, **more), about)


def commit_chain(
    store: ArtifactStore, packed: PackedDataset, base: BaseCheckpoint, folder: Path, *, digest: str, url: str
) -> ServedModel:
    """Commit adapter, merged, published and served model of one digest."""
    adapter = TrainedAdapter(
        **names(store, TrainedAdapter, digest, packed, base),
        adapter_folder=str(folder),
        adapter_digest=f"adapter-{digest}",
        base_folder=base.model_folder,
        base_digest=base.model_digest,
        num_steps=1,
        num_trainable=1,
        first_loss=5.0,
        last_loss=1.0,
        validation_loss_before=5.0,
        validation_loss_after=1.0,
    )
    merged = MergedModel(
        **names(store, MergedModel, digest, commit(store, adapter)),
        model_folder=str(folder),
        model_digest=digest,
        base_folder=base.model_folder,
        num_tensors=1,
        num_changed=1,
        num_shards=1,
        total_bytes=1 << 20,
    )
    published = PublishedModel(
        **names(store, PublishedModel, digest, commit(store, merged)),
        place="hub",
        repo_id="owner/tuned",
        commit=sha256(digest.encode()).hexdigest()[:40],
        url="file:///",
        model_folder=str(folder),
        model_digest=digest,
    )
    served = ServedModel(
        **names(store, ServedModel, f"{digest}-{url}", commit(store, published)),
        model_folder=str(folder),
        model_digest=digest,
        served_model_name="tiny",
        dtype="float32",
        vllm_url=url,
        gateway_url="http://127.0.0.1:1",
        reused=False,
    )
    return commit(store, served)
