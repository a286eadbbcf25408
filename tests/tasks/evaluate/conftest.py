"""A tiny base, a tune of it that learnt its chats, and the chain of artifacts from data set to served model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
from tasks.evaluate.prompts import SHIPPED
from tasks.fetch.run import fetch_dataset
from tasks.pack.run import pack_dataset
from tasks.specs import EvaluateSpec, FetchSpec, PackSpec, ServeSpec
from tests.tiny import byte_tokenizer, make_base, make_model, write_chats

NUM_QUESTIONS, NUM_SAFETY = 6, 4


@dataclass(frozen=True)
class Line:
    """What was made; `tuned` and `base` are models in memory that are also on disk."""

    store: ArtifactStore
    packed: PackedDataset
    base: BaseCheckpoint
    base_model: Any
    tuned_model: Any
    tuned_folder: Path
    spec: EvaluateSpec

    def serve(self, url: str, digest: str = "tuned", folder: Path | None = None) -> ServedModel:
        """Commit the chain from an adapter to a model that is served at `url`."""
        model = str(folder or self.tuned_folder)
        adapter = _commit(
            self.store,
            TrainedAdapter(
                **_names(self.store, TrainedAdapter, digest, self.packed, self.base),
                adapter_folder=model,
                adapter_digest=f"adapter-{digest}",
                base_folder=self.base.model_folder,
                base_digest=self.base.model_digest,
                num_steps=1,
                num_trainable=1,
                first_loss=5.0,
                last_loss=1.0,
                validation_loss_before=5.0,
                validation_loss_after=1.0,
            ),
        )
        merged = _commit(
            self.store,
            MergedModel(
                **_names(self.store, MergedModel, digest, adapter),
                model_folder=model,
                model_digest=digest,
                base_folder=self.base.model_folder,
                num_tensors=1,
                num_changed=1,
                num_shards=1,
                total_bytes=1 << 20,
            ),
        )
        published = _commit(
            self.store,
            PublishedModel(
                **_names(self.store, PublishedModel, digest, merged),
                place="local",
                repo_id="local/tiny",
                commit="c" * 40,
                url="file:///",
                model_folder=model,
                model_digest=digest,
            ),
        )
        return _commit(
            self.store,
            ServedModel(
                **_names(self.store, ServedModel, f"{digest}-{url}", published),
                model_folder=model,
                model_digest=digest,
                served_model_name="tiny",
                dtype="float32",
                vllm_url=url,
                gateway_url="http://127.0.0.1:1",
                reused=False,
            ),
        )


def _names(store: ArtifactStore, cls: type[Artifact], seed: str, *parents: Artifact) -> dict[str, Any]:
    from hashlib import sha256

    key = sha256(f"{cls.kind}{seed}".encode()).hexdigest()
    return {"key": key, "folder": str(store.folder(cls, key)), "parents": tuple(parent.ref for parent in parents)}


def _commit(store: ArtifactStore, artifact: Any) -> Any:
    with store.claim(type(artifact), artifact.key) as claim:
        return claim.found or claim.commit(artifact, spec=ServeSpec(max_model_len=512))


def write_suite(folder: Path) -> Path:
    """The first of the shipped questions: enough for the arithmetic, quick on one core."""
    folder.mkdir()
    for name, count in (("questions", NUM_QUESTIONS), ("safety", NUM_SAFETY)):
        lines = (SHIPPED / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    return folder


def tune(model: Any, documents: list[dict[str, Any]], steps: int) -> None:
    """Teach a tiny model its documents by heart."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in documents:
            ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
            labels = ids.clone()
            labels[0, : len(row["prompt_ids"])] = -100
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    import pyarrow.parquet as pq
    from huggingface_hub import HfApi

    folder = tmp_path_factory.mktemp("evaluate")
    store = ArtifactStore(folder / "home")
    chats = write_chats(folder / "chats.jsonl", 24)
    dataset = fetch_dataset(FetchSpec(source=str(chats), validation_pct=30.0), store, HfApi(token=False))
    base = make_base(store, folder / "base")
    packed = pack_dataset(dataset, base, PackSpec(row_tokens=64), store)
    base_model, tuned_model = make_model(), make_model()
    documents = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()
    tune(tuned_model, documents, 6)
    tuned_model.save_pretrained(folder / "tuned")
    byte_tokenizer().save_pretrained(folder / "tuned")
    spec = EvaluateSpec(
        questions=str(write_suite(folder / "suite")),
        max_answer_tokens=4,
        min_safety_score=0.0,
        max_safety_drop=1.0,
        device="cpu",
    )
    return Line(store, packed, base, base_model, tuned_model, folder / "tuned", spec)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]
