"""Who is measured, and with what: candidate, base, incumbent; documents, questions, dtype.

    ServedModel -> make_yardstick(), base_of(), find_incumbent() -> run.py

Ring: edge.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.artifacts import (
    Artifact,
    ArtifactStore,
    BaseCheckpoint,
    Decision,
    MergedModel,
    PackedDataset,
    ServedModel,
    TrainedAdapter,
)
from tasks.errors import MissingError, SpecError
from tasks.evaluate.prompts import Suite, load_suite, render_suite
from tasks.specs import EvaluateSpec, PackSpec

VERSION = 1  # raised when the same model and yardstick would give other figures
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model that is measured. `url` is empty for model files."""

    model_digest: str
    folder: Path
    url: str = ""
    name: str = ""  # under which the endpoint serves it
    parents: tuple[Artifact, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What every model is measured with. `vocabulary` is the documents'."""

    spec: EvaluateSpec
    suite: Suite
    documents: list[dict[str, Any]]  # Any: token columns
    pack: PackSpec
    dtype: str
    vocabulary: str
    needed_bytes: int

    @property
    def digest(self) -> str:
        """Name everything that decides the figures of a model."""
        rows = [[document["row_id"], document["prompt_ids"], document["answer_ids"]] for document in self.documents]
        pack = [self.pack.prompt_date, self.pack.system_prompt]
        question = [VERSION, self.spec.key_values(), self.suite.digest, rows, pack, self.dtype]
        return sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def make_yardstick(served: ServedModel, spec: EvaluateSpec, store: ArtifactStore) -> Yardstick:
    """Return what a candidate and all it is compared with are measured with. Raises MissingError or DataError."""
    packed, merged = store.ancestor(served, PackedDataset), store.ancestor(served, MergedModel)
    manifest = store.manifest(PackedDataset, packed.key) or {}
    pack = PackSpec.model_validate(manifest["spec"])
    served_manifest = store.manifest(ServedModel, served.key) or {}
    limit = served_manifest.get("spec", {}).get("max_model_len") or packed.row_tokens + 1
    documents = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()
    fitting = [row for row in documents if len(row["prompt_ids"]) + len(row["answer_ids"]) < limit]
    if len(fitting) < len(documents):
        logger.warning("%d validation answers are longer than the endpoint takes", len(documents) - len(fitting))
    suite = load_suite(spec)
    growth = 2 if served.dtype == "float32" else 1  # bf16 files opened in float32
    return Yardstick(
        spec=spec,
        suite=suite,
        documents=[row for row in fitting if row["answer_ids"]][: spec.num_documents],
        pack=pack,
        dtype=served.dtype,
        vocabulary=render_suite(Path(served.model_folder), suite, pack).vocabulary,
        needed_bytes=growth * merged.total_bytes + (1 << 30),
    )


def find_incumbent(served: ServedModel, verified: Mapping[str, str], store: ArtifactStore) -> Subject | None:
    """Return the model that the candidate would replace: the last verified, else the last promoted other one."""
    digest = json.loads(verified.get("ids") or "{}").get("TATARA_MODEL_DIGEST", "")
    places = [(digest, verified.get("model", ""))]
    places += [(past.model_digest, past.model_folder) for past in store.committed(Decision)[::-1] if past.promoted]
    for model_digest, folder in places:
        if model_digest and model_digest != served.model_digest and Path(folder).is_dir():
            return Subject(model_digest=model_digest, folder=Path(folder))
    return None


def base_of(served: ServedModel, store: ArtifactStore) -> Subject:
    """Return the model that the candidate was tuned from."""
    adapter = store.ancestor(served, TrainedAdapter)
    base = store.ancestor(served, BaseCheckpoint)
    return Subject(model_digest=adapter.base_digest, folder=Path(adapter.base_folder), parents=(base,))


def find_served(name: str, store: ArtifactStore) -> ServedModel:
    """Return the served model whose key begins with `name`, or the newest as `latest`.

    Raises: MissingError listing what exists, SpecError when several fit.
    """
    served = store.committed(ServedModel)
    fitting = served[-1:] if name == "latest" else [each for each in served if name and each.key.startswith(name)]
    known = ", ".join(each.short for each in served[-20:]) or "none"
    if not fitting:
        raise MissingError(f"there is no served model {name!r} below {store.root}; there are: {known}")
    if len(fitting) > 1:
        raise SpecError(f"served model {name!r} fits {len(fitting)} of: {known}; give more digits")
    return fitting[0]
