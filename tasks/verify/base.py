"""Verify a model that was pretrained here: its endpoint against its files, and against random weights.

Ring: edge.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tasks import files
from tasks.artifacts import ArtifactStore, PretrainedModel, PublishedModel, ServedModel, TokenizedCorpus
from tasks.errors import MissingError, SpecError
from tasks.specs import VerifySpec
from tasks.verify.base_probes import PROBE_TOKENS, choose_spans
from tasks.verify.scoring import Json, computed_once

_VERSION = 1
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def find_base(served: ServedModel, store: ArtifactStore) -> PretrainedModel | None:
    """Return the pretrained model that is served; None when it is a tune."""
    published = store.ancestor(served, PublishedModel)
    made = [store.load(ref) for ref in published.parents if ref.startswith(f"{PretrainedModel.kind}/")]
    return made[0] if made and isinstance(made[0], PretrainedModel) else None


def probe_documents(model: PretrainedModel, spec: VerifySpec, store: ArtifactStore) -> list[Json]:
    """Return what is scored: the given texts, else parts of the corpus, each with its first token as prompt.

    Raises: SpecError when there is neither.
    """
    rows = _given(model, spec) if spec.probe_texts else _of_corpus(model, spec.num_answers, store)
    return [
        {"row_id": str(number), "prompt_ids": ids[:1], "answer_ids": ids[1:]}
        for number, ids in enumerate(rows)
        if len(ids) > 1
    ]


def _given(model: PretrainedModel, spec: VerifySpec) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model.model_folder)  # Any: one class per family
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:PROBE_TOKENS] for text in spec.probe_texts]
    if not any(len(row) > 1 for row in rows):
        raise SpecError(f"VerifySpec.probe_texts = {spec.probe_texts!r}: expected a text of two tokens or more")
    return rows


def _of_corpus(model: PretrainedModel, count: int, store: ArtifactStore) -> list[list[int]]:
    try:
        corpus = store.ancestor(model, TokenizedCorpus)
    except MissingError as error:
        raise SpecError(
            f"the corpus of {model.origin} is not below {store.root} any more, so there is nothing to probe it with: "
            "give VerifySpec.probe_texts, or run its pretraining flow again"
        ) from error
    ends = np.fromfile(corpus.path / "document_ends.bin", "<i8").tolist()
    tokens = np.memmap(corpus.path / "tokens.bin", np.dtype(corpus.dtype).newbyteorder("<"), "r")
    return [tokens[start:end].tolist() for start, end in choose_spans(ends, count)]


def base_scores(
    served: ServedModel, model: PretrainedModel, documents: list[Json], spec: VerifySpec, store: ArtifactStore
) -> Json:
    """Return what reference.py says of the published files and of random weights of their config and seed."""
    seed = (store.manifest(PretrainedModel, model.key) or {}).get("spec", {}).get("seed", 0)
    folder = Path(model.model_folder)
    identity = [
        "base",
        _VERSION,
        model.model_digest,
        served.dtype,
        [document["prompt_ids"] + document["answer_ids"] for document in documents],
        seed,
        spec.num_greedy_prompts,
        spec.greedy_tokens,
    ]
    job = {
        "merged": str(folder),
        "untrained_seed": seed,
        "documents": documents,
        "dtype": served.dtype,
        "num_greedy_prompts": spec.num_greedy_prompts,
        "greedy_tokens": spec.greedy_tokens,
    }
    stored_bytes = sum(path.stat().st_size for path in files.weight_files(folder))
    return computed_once(
        identity, job, max(stored_bytes, _BYTES[served.dtype] * model.num_parameters) + (2 << 30), store
    )
