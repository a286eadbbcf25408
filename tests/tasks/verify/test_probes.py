"""Only the merged model, served whole, passes; the base, another model or a damaged one fails by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import AttestationError, CorruptError
from tasks.specs import VerifySpec
from tasks.verify import probes as subject
from tasks.verify.probes import Gain, Scores, compare

SPEC = VerifySpec(max_logprob_gap=0.02, min_base_margin=0.05)
nats = st.floats(-12, 0)


def test_request_scores_given_tokens_and_generates_almost_nothing():
    assert subject.scoring_request("tatara-tiny", [1, 2], [3]) == {
        "model": "tatara-tiny",
        "prompt": [1, 2, 3],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "add_special_tokens": False,
    }


def _reply(tokens: list[int], values: list[float]) -> dict[str, Any]:
    """The form of vLLM's answer: nothing for the first token, then one entry a token, extra ranks beside it."""
    entries: list[Any] = [{str(token): {"logprob": value}} for token, value in zip(tokens, values, strict=True)]
    entries[0] = None
    for entry in entries[1:]:
        entry.setdefault("0", {"logprob": -0.5})
    return {"choices": [{"text": "", "prompt_logprobs": entries}]}


@given(st.lists(st.tuples(st.integers(1, 999), nats), min_size=2, max_size=20), st.data())
def test_log_probabilities_of_the_answer_are_picked(pairs: list[tuple[int, float]], data: st.DataObject):
    tokens, values = [token for token, _ in pairs], [value for _, value in pairs]
    cut = data.draw(st.integers(1, len(tokens) - 1))
    assert subject.answer_logprobs(_reply(tokens, values), tokens[:cut], tokens[cut:]) == values[cut:]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "returned no prompt log-probabilities, expected 3: is it vLLM?"),
        ({"choices": []}, "returned no prompt log-probabilities"),
        ({"choices": [{"prompt_logprobs": None}]}, "returned no prompt log-probabilities"),
        (_reply([1, 2], [0, 0]), "returned 2 prompt log-probabilities, expected 3"),
        (_reply([1, 2, 7], [0, 0, 0]), "scored tokens 7, 0 where 3 was asked for"),
        (
            {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": 0}}, None]}]},
            "scored tokens none where 3 was asked",
        ),
    ],
)
def test_reply_that_is_not_about_our_tokens_is_refused(reply: dict[str, Any], message: str):
    with pytest.raises(CorruptError, match=message.replace("?", r"\?")):
        subject.answer_logprobs(reply, [1, 2], [3])


@given(nats, nats, nats)
def test_passes_exactly_when_near_the_merged_and_better_than_the_base(served: float, merged: float, base: float):
    scores = compare([served], [merged], [base], [merged])
    gap = abs(served - merged)
    good = gap <= 0.02 and gap <= 0.25 * abs(merged - base) and served - base >= 0.05
    if good:
        subject.check_scores(scores, SPEC, "bfloat16")
    else:
        with pytest.raises(AttestationError):
            subject.check_scores(scores, SPEC, "bfloat16")


def test_a_deploy_of_the_base_is_told_as_such():
    with pytest.raises(AttestationError, match=r"is -4\.0010, the merged files give -3\.0000 \(gap 1\.0010, allowed 0\.02\)\.") as caught:  # fmt: skip  # noqa: E501
        subject.check_scores(compare([-4.001], [-3.0], [-4.0], [-3.0]), SPEC, "bfloat16")
    assert "It answers like the base. Redeploy the merged folder" in str(caught.value)


def test_another_model_is_not_called_the_base():
    with pytest.raises(AttestationError) as caught:
        subject.check_scores(compare([-7.0], [-3.0], [-4.0], [-3.0]), SPEC, "bfloat16")
    assert "the served model is not the merged one" in str(caught.value)
    assert "like the base" not in str(caught.value)


def test_a_tune_that_learnt_nothing_is_refused():
    with pytest.raises(
        AttestationError, match=r"no better than its base .*-3\.0000 against -3\.0100 \(margin 0\.0100, want"
    ):
        subject.check_scores(compare([-3.0], [-3.0], [-3.01], [-3.0]), SPEC, "bfloat16")


def test_another_tune_of_the_same_mean_is_found_token_by_token():
    """The means agree to the last digit; the tokens do not."""
    merged, base = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.5, -3.5, -4.5]
    other = [-1.25, -1.75, -3.25, -3.75]
    scores = compare(other, merged, base, merged)
    assert scores.served == scores.merged
    with pytest.raises(AttestationError, match=r"differ by 0\.2500 .* moved by 0\.5000 \(allowed 0\.25 .*another tune"):
        subject.check_scores(scores, SPEC, "bfloat16")


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 0.05), ("float16", 0.125), ("bfloat16", 0.25)])
def test_what_is_allowed_token_by_token_follows_the_dtype(dtype: str, gap: float):
    values = {"served": -3.0, "merged": -3.0, "base": -4.0, "tuning_gap": 1.0, "adapter_move": 1.0}
    for off in ("token_gap", "adapter_gap"):
        rest = {"token_gap": 0.0, "adapter_gap": 0.0}
        subject.check_scores(Scores(**values, **{**rest, off: gap}), SPEC, dtype)
        with pytest.raises(AttestationError, match=rf"allowed {gap:g} of that in {dtype}"):
            subject.check_scores(Scores(**values, **{**rest, off: gap * 1.01}), SPEC, dtype)


def test_a_merge_that_is_not_base_and_adapter_is_found_though_it_is_served_faithfully():
    scores = compare([-1.0, -2.0], [-1.0, -2.0], [-1.5, -2.5], [-1.25, -2.25])
    assert scores.served == scores.merged
    with pytest.raises(
        AttestationError, match=r"differ by 0\.2500 from .* PEFT's own .* moved by 0\.2500 \(allowed 0\.25"
    ):
        subject.check_scores(scores, SPEC, "bfloat16")


@pytest.mark.parametrize(
    ("served", "passes"), [(0.76, True), (1.24, True), (0.74, False), (1.26, False), (-1.0, False)]
)
def test_the_gain_is_the_trainers_in_sign_and_size(served: float, passes: bool):
    gain = Gain(trainer=1.0, served=served, error=0.0)
    if passes:
        subject.check_gain(gain, SPEC)
    else:
        with pytest.raises(
            AttestationError, match=rf"better than its base by {served:.4f} .* loss by 1\.0000 .*0\.2500"
        ):
            subject.check_gain(gain, SPEC)


def test_a_gain_that_is_not_a_number_fails():
    with pytest.raises(AttestationError):
        subject.check_gain(Gain(trainer=1.0, served=float("nan"), error=0.0), SPEC)


def test_answers_that_were_not_scored_widen_what_is_allowed():
    values = {"served": [-1.0, -1.0, -2.0], "base": [-2.0, -1.5, -4.0], "lengths": [2, 1], "trainer": 2.0}
    all_scored = subject.measure_gain(**values, num_documents=2)
    some = subject.measure_gain(**values, num_documents=8)
    assert (all_scored.error, some.served) == (0.0, pytest.approx(3.5 / 3))
    off = [1.5 - 2 * 3.5 / 3, 2.0 - 3.5 / 3]
    assert some.error == pytest.approx((sum(v * v for v in off) * 2 * 0.75) ** 0.5 / 3)
    one = subject.measure_gain([-1.0], [-2.0], [1], trainer=9.0, num_documents=5)
    subject.check_gain(one, SPEC)  # one answer of five says nothing of the others


def test_scores_of_other_tokens_are_not_compared():
    with pytest.raises(CorruptError, match="1 served, 2 merged, 2 base and 2 tuned tokens were scored"):
        compare([-1.0], [-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0])


@pytest.mark.parametrize("field", ["served", "merged", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_never_pass(field: str, value: float):
    good = {"served": -3.0, "merged": -3.0, "base": -4.0, "token_gap": 0.0, "tuning_gap": 1.0}
    scores = Scores(**{**good, "adapter_gap": 0.0, "adapter_move": 1.0, field: value})
    with pytest.raises(AttestationError, match=f"not finite .*{field} {value}"):
        subject.check_scores(scores, SPEC, "bfloat16")


@given(st.lists(nats, min_size=1))
def test_mean(values: list[float]):
    assert subject.mean(values) * len(values) == pytest.approx(sum(values), abs=1e-6)


def test_a_merge_in_mxfp4_is_not_held_against_full_precision():
    scores = Scores(served=-3, merged=-3, base=-4, token_gap=0, tuning_gap=1, adapter_gap=0.9, adapter_move=1)
    subject.check_scores(scores, SPEC, "bfloat16", is_requantized=True)
    with pytest.raises(AttestationError, match="PEFT's own merge"):
        subject.check_scores(scores, SPEC, "bfloat16")
