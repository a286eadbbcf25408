"""When a new model may have all requests."""

import pytest

from tasks.serve.canary import NO_COUNTS, Counts, counts_since, judge
from tasks.specs import PromoteSpec

SPEC = PromoteSpec(canary_requests=100, canary_s=60, max_error_excess=0.02, max_latency_ratio=1.5)
GOOD = Counts(answered=900, failed=0, seconds=900.0)


def _new(answered: int, failed: int = 0, mean_s: float = 1.0) -> Counts:
    return Counts(answered=answered, failed=failed, seconds=answered * mean_s)


@pytest.mark.parametrize(
    ("new", "elapsed_s", "verdict"),
    [
        (_new(99), 59, "wait"),
        (_new(100), 1, "pass"),
        (_new(5), 60, "pass"),  # few came; the time is up
        (_new(0), 59, "wait"),
        (_new(0), 60, "it answered no request in 60 s (the old model 900), so nothing says how it does: send it some"),
        (_new(0, failed=2), 1, "wait"),  # one or two may be anybody's
        (_new(0, failed=3), 1, "3 of 3 requests failed (100.0 %)"),
        (_new(98, failed=2), 1, "pass"),  # 2 %: allowed
        (_new(97, failed=3), 1, "3 of 100 requests failed (3.0 %), of the old model 0 of 900 (0.0 %)"),
        (_new(0, failed=1), 60, "1 of 1 requests failed"),
        (_new(100, mean_s=1.54), 1, "pass"),
        (_new(100, mean_s=1.56), 1, "an answer took 1.560 s on the mean of 100, of the old model 1.000 s on that"),
        (_new(99, mean_s=9.0), 1, "wait"),
    ],
)  # fmt: skip
def test_verdict(new: Counts, elapsed_s: float, verdict: str):
    assert judge(new, GOOD, elapsed_s, SPEC).startswith(verdict)


def test_errors_that_the_old_model_makes_as_well_are_no_fault_of_the_new_one():
    assert judge(_new(90, failed=10), Counts(answered=900, failed=90, seconds=900), 1, SPEC) == "pass"


def test_without_answers_of_the_old_model_times_are_not_compared():
    assert judge(_new(100, mean_s=9.0), Counts(answered=0, failed=0, seconds=0.0), 1, SPEC) == "pass"


def test_a_gateway_that_was_restarted_counts_from_zero_and_one_that_says_nothing_adds_nothing():
    again = {"answered": 51, "failed": 0, "seconds": 40.0}
    assert counts_since({"answered": 50, "failed": 60, "seconds": 40.0}, again) == Counts(
        answered=51, failed=0, seconds=40.0
    )
    assert counts_since({"answered": 50, "failed": 0, "seconds": 40.0}, {}) == NO_COUNTS
    now = {"answered": 3, "failed": 1, "seconds": 2.0}
    assert counts_since({"answered": 50, "failed": 0, "seconds": 40.0}, now) == Counts(answered=3, failed=1, seconds=2)
