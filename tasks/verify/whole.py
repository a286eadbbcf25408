"""Verify a model that was trained here as a whole: its endpoint against its files, and against what it began as.

A pretrained one began as random weights, one that was trained with rewards as its base.

Ring: edge.
"""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from tasks import files
from tasks.artifacts import (
    Artifact,
    ArtifactStore,
    PreparedQuestions,
    PretrainedModel,
    PublishedModel,
    ReinforcedModel,
    ServedModel,
    TokenizedCorpus,
    TrainedModel,
)
from tasks.errors import MissingError, SpecError
from tasks.specs import VerifySpec
from tasks.verify.base_probes import PROBE_TOKENS, choose_spans
from tasks.verify.reinforced_probes import choose_questions
from tasks.verify.scoring import Json, computed_once

_VERSION = 1
A = TypeVar("A", bound=Artifact)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def find_whole(served: ServedModel, store: ArtifactStore) -> TrainedModel | None:
    """Return the model that is served when it was trained as a whole; None when it is a tune."""
    published = store.ancestor(served, PublishedModel)
    kinds = tuple(f"{cls.kind}/" for cls in (PretrainedModel, ReinforcedModel))
    made = [store.load(ref) for ref in published.parents if ref.startswith(kinds)]
    return made[0] if made and isinstance(made[0], TrainedModel) else None


def probe_documents(model: TrainedModel, spec: VerifySpec, store: ArtifactStore) -> list[Json]:
    """Return what is scored: the given texts, else parts of the corpus, or the test questions with their answers.

    Of a text the first token is the prompt.  Raises: SpecError when there is none of them.
    """
    if isinstance(model, ReinforcedModel) and not spec.probe_texts:
        return _of_questions(model, spec.num_answers, store)
    rows = _given(model, spec) if spec.probe_texts else _of_corpus(model, spec.num_answers, store)
    return [
        {"row_id": str(number), "prompt_ids": ids[:1], "answer_ids": ids[1:]}
        for number, ids in enumerate(rows)
        if len(ids) > 1
    ]


def _given(model: TrainedModel, spec: VerifySpec) -> list[list[int]]:
    tokenizer = _tokenizer(model)
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:PROBE_TOKENS] for text in spec.probe_texts]
    if not any(len(row) > 1 for row in rows):
        raise SpecError(f"VerifySpec.probe_texts = {spec.probe_texts!r}: expected a text of two tokens or more")
    return rows


def _of_corpus(model: TrainedModel, count: int, store: ArtifactStore) -> list[list[int]]:
    corpus = _origin_of(model, TokenizedCorpus, "corpus", store)
    ends = np.fromfile(corpus.path / "document_ends.bin", "<i8").tolist()
    tokens = np.memmap(corpus.path / "tokens.bin", np.dtype(corpus.dtype).newbyteorder("<"), "r")
    return [tokens[start:end].tolist() for start, end in choose_spans(ends, count)]


def _of_questions(model: ReinforcedModel, count: int, store: ArtifactStore) -> list[Json]:
    questions, tokenizer = _origin_of(model, PreparedQuestions, "questions", store), _tokenizer(model)
    rows = pq.read_table(questions.path / "test.parquet", columns=["prompt", "extra_info"]).to_pylist()
    said = (store.manifest(ReinforcedModel, model.key) or {}).get("spec", {})

    def tokens(row: Json) -> tuple[list[int], list[int]]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        texts = (prompt, row["extra_info"]["answer"])
        prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        return prompt_ids, answer_ids

    return choose_questions(
        map(tokens, rows), count, max_prompt=said["max_prompt_length"], max_answer=said["max_response_length"]
    )


def _origin_of(model: TrainedModel, cls: type[A], what: str, store: ArtifactStore) -> A:
    try:
        return store.ancestor(model, cls)
    except MissingError as error:
        raise SpecError(
            f"the {what} of {model.origin} is not below {store.root} any more, so there is nothing to probe it with: "
            "give VerifySpec.probe_texts, or run the flow that made it again"
        ) from error


def _tokenizer(model: TrainedModel) -> Any:  # Any: one class per family
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.model_folder)


def whole_scores(
    served: ServedModel, model: TrainedModel, documents: list[Json], spec: VerifySpec, store: ArtifactStore
) -> Json:
    """Return what reference.py says of the published files, and of what they were before they were trained."""
    folder = Path(model.model_folder)
    beginning, kind, mark = _beginning(model, store)
    identity = [
        kind,
        _VERSION,
        model.model_digest,
        served.dtype,
        [document["prompt_ids"] + document["answer_ids"] for document in documents],
        mark,
        spec.num_greedy_prompts,
        spec.greedy_tokens,
    ]
    job = {
        "merged": str(folder),
        **beginning,
        "documents": documents,
        "dtype": served.dtype,
        "num_greedy_prompts": spec.num_greedy_prompts,
        "greedy_tokens": spec.greedy_tokens,
    }
    stored_bytes = sum(path.stat().st_size for path in files.weight_files(folder))
    return computed_once(
        identity, job, max(stored_bytes, _BYTES[served.dtype] * model.num_parameters) + (2 << 30), store
    )


def _beginning(model: TrainedModel, store: ArtifactStore) -> tuple[Json, str, str | int]:
    """Return the part of reference.py's job that says what it began as, what that is called, and what it is known by.

    Raises: MissingError when a base is gone.
    """
    if isinstance(model, ReinforcedModel):
        if not (Path(model.base_folder) / "config.json").is_file():
            raise MissingError(
                f"the base of {model.origin} is not at {model.base_folder} any more, and the served model has to be "
                "told from it: run its flow again, which brings it back"
            )
        return {"base": model.base_folder}, "reinforced", model.base_digest
    seed = (store.manifest(PretrainedModel, model.key) or {}).get("spec", {}).get("seed", 0)
    return {"untrained_seed": seed}, "base", seed
