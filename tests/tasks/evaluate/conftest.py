"""A tiny base, a tune of it that learnt its chats, and the chain of artifacts from data set to served model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, ServedModel
from tasks.evaluate.prompts import SHIPPED
from tasks.fetch.run import fetch_dataset
from tasks.pack.run import pack_dataset
from tasks.specs import EvaluateSpec, FetchSpec, PackSpec
from tests.chain import commit_chain
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
        return commit_chain(self.store, self.packed, self.base, folder or self.tuned_folder, digest=digest, url=url)


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
