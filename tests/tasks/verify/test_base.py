"""A pretrained model's attestation: wrong and untrained weights fail; transformers in vLLM's place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.artifacts import ArtifactStore, PretrainedModel, PublishedModel, ServedModel, TokenizedCorpus
from tasks.errors import AttestationError, DataError, SpecError
from tasks.specs import VerifySpec
from tasks.verify import reference
from tasks.verify.base_probes import PROBE_TOKENS, TOKEN_GAPS, check_base_scores, choose_spans
from tasks.verify.probes import Scores, compare
from tasks.verify.whole import find_whole, probe_documents, whole_scores
from tests import chain
from tests.pretrained import SENTENCES, make_pretrained

pytestmark = pytest.mark.long

SPEC = VerifySpec(min_base_margin=1.0, max_logprob_gap=0.01, num_answers=6, num_greedy_prompts=1, greedy_tokens=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store: ArtifactStore) -> PretrainedModel:
    return make_pretrained(store)


def serve(store: ArtifactStore, model: PretrainedModel) -> ServedModel:
    more: dict[str, Any] = {"model_folder": model.model_folder, "model_digest": model.model_digest}
    published = PublishedModel(
        **chain.names(store, PublishedModel, model.key, model),
        **more,
        place="local",
        repo_id="l/t",
        commit="c",
        url="f",
    )
    served = ServedModel(
        **chain.names(store, ServedModel, model.key, chain.commit(store, published)),
        **more,
        served_model_name="t",
        dtype="float32",
        vllm_url="http://127.0.0.1:1",
        gateway_url="http://127.0.0.1:1",
        reused=False,
    )
    return chain.commit(store, served)


def scores_of(store: ArtifactStore, model: PretrainedModel, served_folder: str) -> Scores:
    """Serve `served_folder` while the artifacts say that `model` is served."""
    documents = probe_documents(model, SPEC, store)
    said = whole_scores(serve(store, model), model, documents, SPEC, store)
    values = reference.score_documents(reference.load_model(Path(served_folder), "float32"), documents)
    return compare(values, said["merged"], said["base"], said["merged"])


def test_the_right_files_pass_and_random_weights_are_as_good_as_guessing(store: ArtifactStore, model: PretrainedModel):
    scores = scores_of(store, model, model.model_folder)
    check_base_scores(scores, SPEC, "float32")
    assert scores.token_gap == 0.0
    assert scores.base == pytest.approx(-np.log(512), abs=0.5)
    assert scores.served > -1.5  # it knows its sentences


@pytest.mark.slow
def test_what_is_not_the_model_fails(store: ArtifactStore, model: PretrainedModel):
    untrained, other = make_pretrained(store, num_steps=0), make_pretrained(store, num_steps=45)
    with pytest.raises(AttestationError, match=r"not the published one.*It answers like random weights"):
        check_base_scores(scores_of(store, model, untrained.model_folder), SPEC, "float32")
    with pytest.raises(AttestationError, match="no better than random weights"):
        check_base_scores(scores_of(store, untrained, untrained.model_folder), SPEC, "float32")
    with pytest.raises(AttestationError, match="not the published one"):
        check_base_scores(scores_of(store, model, other.model_folder), SPEC, "float32")


def test_tokens_that_are_off_fail_though_the_mean_is_right():
    right = Scores(
        served=-1.0, merged=-1.0, base=-6.0, token_gap=0.0, tuning_gap=5.0, adapter_gap=0.0, adapter_move=0.0
    )
    for dtype, allowed in TOKEN_GAPS.items():
        check_base_scores(replace(right, token_gap=0.9 * allowed), SPEC, dtype)
        with pytest.raises(
            AttestationError, match=f"token by token {1.1 * allowed:.4f}, allowed {allowed:g} in {dtype}"
        ):
            check_base_scores(replace(right, token_gap=1.1 * allowed), SPEC, dtype)
    with pytest.raises(AttestationError, match="not finite"):
        check_base_scores(replace(right, served=float("nan")), SPEC, "float32")


def test_probes_are_parts_of_the_corpus_or_the_given_texts(store: ArtifactStore, model: PretrainedModel):
    corpus = store.ancestor(model, TokenizedCorpus)
    ends = np.fromfile(corpus.path / "document_ends.bin", "<i8")
    tokens = np.fromfile(corpus.path / "tokens.bin", "<u2")
    rows = [document["prompt_ids"] + document["answer_ids"] for document in probe_documents(model, SPEC, store)]
    assert len(rows) == 6
    assert rows[0] == tokens[: ends[0]].tolist() and all(len(row) > 1 for row in rows)
    given = SPEC.model_copy(update={"probe_texts": (SENTENCES[0],)})
    [document] = probe_documents(model, given, store)
    assert document["prompt_ids"] + document["answer_ids"] == rows[0][:-1]  # without the end token
    with pytest.raises(SpecError, match="expected a text of two tokens"):
        probe_documents(model, SPEC.model_copy(update={"probe_texts": ("",)}), store)


def test_without_its_corpus_texts_are_asked_for(store: ArtifactStore, model: PretrainedModel):
    orphan = model.model_copy(update={"parents": ()})
    with pytest.raises(SpecError, match=r"corpus of pretrained .* give VerifySpec\.probe_texts"):
        probe_documents(orphan, SPEC, store)


def test_only_a_pretrained_model_is_verified_as_one(store: ArtifactStore, model: PretrainedModel, tmp_path: Path):
    assert find_whole(serve(store, model), store) == model
    base = chain.commit_base(store)
    packed = chain.commit_packed(store, base, base)
    assert find_whole(chain.commit_chain(store, packed, base, tmp_path, digest="d", url="http://x"), store) is None


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 20))
def test_spans_lie_within_their_documents(lengths: list[int], count: int):
    ends = np.cumsum(lengths).tolist()
    if not any(length > 1 for length in lengths):
        with pytest.raises(DataError):
            choose_spans(ends, count)
        return
    spans = choose_spans(ends, count)
    starts = [0, *ends[:-1]]
    assert 1 <= len(spans) <= count and len(set(spans)) == len(spans)
    for first, last in spans:
        assert 2 <= last - first <= PROBE_TOKENS
        assert any(start <= first and last <= end for start, end in zip(starts, ends, strict=True))
