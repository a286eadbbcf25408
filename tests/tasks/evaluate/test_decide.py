"""The rule: who is promoted, what chance excuses, and what it does not."""

import math
import random
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.chance import loss_interval, sign_test
from tasks.evaluate.decide import decide
from tasks.evaluate.report import Compared, decision_markdown, differences
from tasks.evaluate.results import Answered, DocumentLoss, Judged, Metric, Results
from tasks.specs import EvaluateSpec

SPEC = EvaluateSpec(min_base_margin=0.1)


def results(
    loss: float = 2.0,
    right: int = 50,
    exact: int = 40,
    safe: int = 30,
    *,
    spread: float = 0.1,
    plugins: dict[str, Metric] | None = None,
    num_documents: int = 40,
) -> Results:
    """60 questions, 36 safety questions; losses around `loss`, with the same noise by document in every model."""
    noise = random.Random(7)
    documents = [
        DocumentLoss(row_id=str(i), nats=(loss + noise.uniform(-spread, spread)) * 20, num_tokens=20)
        for i in range(num_documents)
    ]
    questions = [
        Answered(id=str(i), group="kept", scores=(), chosen="", is_chosen=i < right, said="", is_exact=i < exact)
        for i in range(60)
    ]
    safety = [
        Judged(id=str(i), expected="refuse", scores=(), is_preferred=i < safe, said="", is_generated=i < safe)
        for i in range(36)
    ]
    return Results(documents=documents, questions=questions, safety=safety, plugins=plugins or {})


def failed(candidate: Results, base: Results, incumbent: Results | None = None, spec: EvaluateSpec = SPEC) -> list[str]:
    verdict = decide(candidate, base, incumbent, spec)
    texts = [check.text for check in verdict.checks if not check.passed]
    assert verdict.promoted == (not texts)
    assert verdict.reasons == (tuple(texts) or tuple(check.text for check in verdict.checks))
    return texts


def test_better_than_both_is_promoted():
    assert failed(results(1.5), results(2.0), results(1.8)) == []
    assert failed(results(1.5), results(2.0)) == []


@pytest.mark.parametrize(
    ("candidate", "against", "message"),
    [
        (results(1.95), "base", "of the base, +0.0500 better"),
        (results(1.5, right=40), "both", "choice accuracy: 0.667 against 0.833 of the base on 60 questions, 10 lost"),
        (results(1.5, exact=30), "both", "exact accuracy: 0.500 against 0.667"),
        (results(1.5, safe=27), "both", "safety by preference: 0.750 against 0.833 of the base, 3 lost and 0 won"),
        (results(1.5, safe=20), "both", "safety as generated: 0.556 of 36 questions (least allowed 0.7)"),
        (results(float("nan")), "base", "validation loss: the candidate's is nan, expected a finite number"),
        (results(num_documents=0), "base", "validation loss: no validation answer was scored"),
        (results(1.85), "incumbent", "of the incumbent, -0.0500 better"),
    ],
)
def test_each_check_fails_by_name_with_its_figures(candidate: Results, against: str, message: str):
    texts = failed(candidate, results(2.0), results(1.8))
    assert any(message in text for text in texts), texts
    if against == "incumbent":
        assert all("of the incumbent" in text for text in texts)


def test_noise_of_a_few_questions_does_not_decide():
    """Three of sixty lost is a drop over the limit, and well within chance."""
    spec = SPEC.model_copy(update={"max_accuracy_drop": 0.03})
    assert failed(results(1.5, right=47), results(2.0), spec=spec) == []
    assert failed(results(1.5, right=45), results(2.0), spec=spec) != []  # 5 to 0: chance 0.031


def test_chance_is_no_excuse_in_safety():
    assert failed(results(1.5, safe=28), results(2.0)) == []  # 2 of 36 is below the limit
    assert failed(results(1.5, safe=27), results(2.0)) != []  # 3 of 36, chance 0.125


def test_a_loss_that_is_lower_by_chance_does_not_beat_the_incumbent():
    ours, theirs = results(1.79), results(1.80)
    wild = random.Random(3)
    noisy = [
        DocumentLoss(row_id=row.row_id, nats=row.nats + wild.uniform(-20, 20), num_tokens=row.num_tokens)
        for row in ours.documents
    ]
    mean = sum(row.nats for row in noisy) - sum(row.nats for row in ours.documents)
    noisy[0] = DocumentLoss(row_id="0", nats=noisy[0].nats - mean, num_tokens=20)  # the mean is the same
    by_chance = Results(documents=noisy, questions=ours.questions, safety=ours.safety)
    assert failed(ours, results(2.0), theirs) == []
    assert any("of the incumbent, +0.0100 better" in text for text in failed(by_chance, results(2.0), theirs))
    lenient = SPEC.model_copy(update={"against_incumbent": "not_worse"})
    assert failed(by_chance, results(3.0), theirs, lenient) == []
    assert failed(results(1.9), results(3.0), theirs, lenient) != []  # worse beyond chance


def test_the_same_model_again_does_not_beat_itself():
    assert any("+0.0000 better" in text for text in failed(results(1.5), results(2.0), results(1.5)))


def test_a_base_of_another_tokenizer_is_not_compared_by_loss():
    verdict = decide(results(1.5), results(num_documents=0), None, SPEC)
    assert verdict.promoted
    assert any("not compared with the base, its tokenizer is another one" in check.text for check in verdict.checks)


@pytest.mark.parametrize(("value", "promoted"), [(0.50, True), (0.45, True), (0.30, False), (float("nan"), False)])
def test_plugins_count_beyond_their_standard_errors(value: float, promoted: bool):
    candidate = results(1.5, plugins={"lm_eval:t": Metric(value=value, stderr=0.03)})
    base = results(2.0, plugins={"lm_eval:t": Metric(value=0.50, stderr=0.03)})
    assert decide(candidate, base, None, SPEC).promoted is promoted
    assert decide(candidate, results(2.0), None, SPEC).promoted  # the base was not measured with it


def test_other_questions_are_not_compared():
    short = results(2.0)
    short.questions.pop()
    with pytest.raises(ValueError, match="not asked the same questions"):
        decide(results(1.5), short, None, SPEC)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (4, 1), (3, 3), (0, 6)])
def test_sign_test_counts_the_coins(lost: int, won: int):
    throws = list(product((0, 1), repeat=lost + won))
    assert sign_test(lost, won) == pytest.approx(sum(sum(throw) >= lost for throw in throws) / len(throws))


@given(st.integers(2, 40), st.integers(0, 10**6))
def test_interval_holds_the_value_and_narrows_with_alpha(count: int, seed: int):
    draw = random.Random(seed)
    pairs = [(draw.uniform(1, 50), draw.uniform(1, 50), draw.randint(1, 30)) for _ in range(count)]
    ours = [DocumentLoss(row_id=str(i), nats=a, num_tokens=n) for i, (a, _, n) in enumerate(pairs)]
    theirs = [DocumentLoss(row_id=str(i), nats=b, num_tokens=n) for i, (_, b, n) in enumerate(pairs)]
    wide, narrow = loss_interval(ours, theirs, 0.01), loss_interval(ours, theirs, 0.2)
    expected = sum(b - a for a, b, _ in pairs) / sum(n for *_, n in pairs)
    assert wide.value == narrow.value == pytest.approx(expected)
    assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high
    back = loss_interval(theirs, ours, 0.2)
    assert (back.low, back.high) == pytest.approx((-narrow.high, -narrow.low))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw, covered, rounds = random.Random(11), 0, 600
    for _ in range(rounds):
        lengths = [draw.randint(5, 40) for _ in range(40)]
        ours = [DocumentLoss(row_id="", nats=2.0 * n, num_tokens=n) for n in lengths]
        theirs = [DocumentLoss(row_id="", nats=(2.3 + draw.gauss(0, 0.5)) * n, num_tokens=n) for n in lengths]
        interval = loss_interval(ours, theirs, 0.1)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.86 <= covered / rounds <= 0.93


def test_one_document_proves_nothing():
    one = [DocumentLoss(row_id="", nats=1.0, num_tokens=1)]
    interval = loss_interval(one, one, 0.05)
    assert (interval.value, interval.low, interval.high) == (0.0, -math.inf, math.inf)


def test_report_names_figures_checks_and_what_changed():
    base, ours = results(2.0), results(1.5, right=52, safe=36)
    compared = Compared(candidate=ours, incumbent=None, base=base)
    text = decision_markdown("tiny", compared, decide(ours, base, None, SPEC), "/home/decision")
    assert "# tiny: promoted" in text and "| | candidate | base |" in text
    assert "| what must not be unlearnt (60), choices | 0.8667 | 0.8333 |" in text
    assert "- passed: validation loss" in text and "`/home/decision/differences.jsonl`" in text
    rows: list[dict[str, Any]] = differences(compared)
    assert [(row["id"], row["way"], row["change"]) for row in rows[:2]] == [
        ("50", "choice", "won"),
        ("51", "choice", "won"),
    ]
    assert len(rows) == 2 + 2 * 6 and f"## {len(rows)} differences" in text
