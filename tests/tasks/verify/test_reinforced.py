"""A PPO model's attestation: its base and other weights fail, one that hardly moved is said; transformers as vLLM."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flows.recipes import resolve_ppo
from tasks.artifacts import ArtifactStore, HealthReport, PreparedQuestions, PublishedModel, ReinforcedModel, ServedModel
from tasks.errors import AttestationError, MissingError
from tasks.specs import VerifySpec
from tasks.verify import reference
from tasks.verify.probes import Scores, compare
from tasks.verify.reinforced_probes import check_reinforced_scores, find_doubt
from tasks.verify.report import health_markdown
from tasks.verify.whole import find_whole, probe_documents, whole_scores
from tests import chain
from tests.reinforced import LENGTHS, make_reinforced, save_moved

pytestmark = pytest.mark.long

SPEC = VerifySpec(max_logprob_gap=0.5, num_answers=4, num_greedy_prompts=1, greedy_tokens=4, must_beat_base=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store: ArtifactStore) -> ReinforcedModel:
    return make_reinforced(store, store.root.parent / "base", resolve_ppo("tiny_ppo"))[1]


def serve(store: ArtifactStore, model: ReinforcedModel) -> ServedModel:
    more: dict[str, Any] = {"model_folder": model.model_folder, "model_digest": model.model_digest}
    names = chain.names(store, PublishedModel, model.key, model)
    published = PublishedModel(**names, **more, place="local", repo_id="l/t", commit="c", url="f")
    nowhere: dict[str, Any] = {"vllm_url": "http://127.0.0.1:1", "gateway_url": "http://127.0.0.1:1", "reused": False}
    names = chain.names(store, ServedModel, model.key, chain.commit(store, published))
    return chain.commit(store, ServedModel(**names, **more, served_model_name="t", dtype="float32", **nowhere))


def scores_of(store: ArtifactStore, model: ReinforcedModel, served_folder: str | Path) -> Scores:
    """Serve `served_folder` while the artifacts say that `model` is served."""
    served = serve(store, model)
    assert find_whole(served, store) == model
    documents = probe_documents(model, SPEC, store)
    said = whole_scores(served, model, documents, SPEC, store)
    values = reference.score_documents(reference.load_model(Path(served_folder), "float32"), documents)
    return compare(values, said["merged"], said["base"], said["merged"])


def test_the_right_files_pass_and_are_told_from_the_base(store: ArtifactStore, model: ReinforcedModel):
    scores = scores_of(store, model, model.model_folder)
    assert scores.token_gap == 0.0 and scores.tuning_gap > 0.01
    check_reinforced_scores(scores, SPEC, "float32")
    assert find_doubt(scores, SPEC, "float32") == ""


def test_its_base_and_other_weights_of_the_same_base_fail(store: ArtifactStore, model: ReinforcedModel, tmp_path: Path):
    with pytest.raises(AttestationError, match="the served model is not the merged one"):
        check_reinforced_scores(scores_of(store, model, model.base_folder), SPEC, "float32")
    other = save_moved(Path(model.base_folder), tmp_path / "other", 20, seed=2)
    with pytest.raises(AttestationError, match="the served model is not the merged one"):
        check_reinforced_scores(scores_of(store, model, other), SPEC, "float32")


def test_one_that_did_not_move_is_not_called_proven(tmp_path: Path):
    """Its files are the base's to the last bit: served faithfully, and still no proof."""
    store = ArtifactStore(tmp_path / "home")
    _, still = make_reinforced(store, tmp_path / "base", resolve_ppo("tiny_ppo"), num_steps=0)
    scores = scores_of(store, still, still.model_folder)
    assert scores.tuning_gap == 0.0
    with pytest.raises(AttestationError, match=r"don't tell the served model from its base.*may_equal_base"):
        check_reinforced_scores(scores, SPEC, "float32")
    allowed = SPEC.model_copy(update={"may_equal_base": True})
    check_reinforced_scores(scores, allowed, "float32")
    with pytest.raises(AttestationError, match="is not the merged one"):  # other weights are other weights all the same
        check_reinforced_scores(replace(scores, token_gap=0.002), allowed, "float32")


def test_rounding_is_no_proof_and_no_excuse():
    """In bfloat16 a small move is lost in rounding; a gap that rounding can't explain is another model."""
    moved = Scores(
        served=-1.0, merged=-1.0, base=-1.0, token_gap=0.02, tuning_gap=0.1, adapter_gap=0.0, adapter_move=0.0
    )
    check_reinforced_scores(moved, SPEC, "bfloat16")  # 0.02 < 0.25 * 0.1
    little = replace(moved, tuning_gap=0.03)
    with pytest.raises(AttestationError, match=r"training moved .* by 0\.03 a token, and the endpoint is 0\.02"):
        check_reinforced_scores(little, SPEC, "bfloat16")
    for bad in (replace(little, token_gap=0.2), replace(little, served=float("nan"))):
        with pytest.raises(AttestationError, match=r"not the merged one|not finite"):
            check_reinforced_scores(bad, SPEC.model_copy(update={"may_equal_base": True}), "bfloat16")


def test_the_probes_are_test_questions_as_the_training_asked_them(store: ArtifactStore, model: ReinforcedModel):
    documents = probe_documents(model, SPEC, store)
    tokenizer: Any = AutoTokenizer.from_pretrained(model.model_folder)  # Any: one class per family
    assert len(documents) == 4
    for document in documents:
        prompt = tokenizer.decode(document["prompt_ids"])
        assert prompt.startswith("<|start|>user<|message|>") and prompt.endswith("<|start|>assistant")
        assert len(document["prompt_ids"]) <= LENGTHS["max_prompt_length"]
        assert 0 < len(document["answer_ids"]) <= LENGTHS["max_response_length"]
    assert store.ancestor(model, PreparedQuestions).num_test_rows >= 4


def test_a_base_that_is_gone_is_said(store: ArtifactStore, model: ReinforcedModel):
    gone = model.model_copy(update={"base_folder": "/nowhere"})
    with pytest.raises(MissingError, match=r"base of PPO .* is not at /nowhere any more"):
        whole_scores(serve(store, model), gone, probe_documents(model, SPEC, store), SPEC, store)


def test_the_report_names_what_was_compared_and_what_was_not_proven(store: ArtifactStore, model: ReinforcedModel):
    numbers: dict[str, Any] = dict.fromkeys(
        ("served_logprob", "merged_logprob", "base_logprob", "token_gap", "tuning_gap"), -1.0
    )
    words: dict[str, Any] = dict.fromkeys(("question", "answer", "gateway_url", "served_model_name"), "x")
    report = HealthReport(key="k", folder="f", passed=True, num_answers=4, **numbers, **words)
    chat = {"question": "q", "answer": "a", "seconds": 1, "first_token_s": 1, "num_stream_pieces": 1}
    about = {"reinforced": model.origin, "chat": chat, "test_scores": [0.0, None], "doubt": ""}
    proven = health_markdown(report, about)
    assert "not the base." in proven and "0.0000 before, not measured after" in proven
    assert "the base it began as" in proven
    assert "NOT PROVEN by log-probabilities: too little" in health_markdown(report, {**about, "doubt": "too little"})
