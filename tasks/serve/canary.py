"""Whether a new model that gets a share of the requests may have them all.

    counts of both at the beginning and now -> judge() -> "wait" | "pass" | why it is worse

Ring: pure.  Units: seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.specs import PromoteSpec

_GRACE_S = 0.05  # below it a ratio of two times says nothing
_ENOUGH_TO_FAIL = 3  # errors; one alone may be anybody's


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of one model's requests since the canary began."""

    answered: int
    failed: int
    seconds: float

    def __add__(self, other: "Counts") -> "Counts":
        """Return what became of both."""
        return Counts(
            answered=self.answered + other.answered,
            failed=self.failed + other.failed,
            seconds=self.seconds + other.seconds,
        )

    @property
    def total(self) -> int:
        """Requests that it answered or failed to."""
        return self.answered + self.failed

    @property
    def error_rate(self) -> float:
        """Share of requests that failed; 0 without any."""
        return self.failed / self.total if self.total else 0.0

    @property
    def mean_s(self) -> float:
        """Mean time of an answer; 0 without any."""
        return self.seconds / self.answered if self.answered else 0.0


NO_COUNTS = Counts(answered=0, failed=0, seconds=0.0)


def counts_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> Counts:  # Any: an entry of /health's upstreams
    """Return what was counted in between two looks; a gateway that was restarted counts from 0.

    Nothing when the second look found no entry.

    >>> counts_since({"answered": 2, "failed": 0, "seconds": 1.0}, {"answered": 5, "failed": 1, "seconds": 2.5})
    Counts(answered=3, failed=1, seconds=1.5)
    """
    if not now:
        return NO_COUNTS
    restarted = any(now.get(name, 0) < before.get(name, 0) for name in ("answered", "failed"))
    start = {} if restarted else before
    answered, failed, seconds = (now.get(name, 0) - start.get(name, 0) for name in ("answered", "failed", "seconds"))
    return Counts(answered=answered, failed=failed, seconds=seconds)


def judge(new: Counts, old: Counts, elapsed_s: float, spec: PromoteSpec) -> str:
    """Return "wait", "pass", or why the new model is worse than the old one.

    Errors are judged at once, times when there are enough answers or the time is up. Without a single answer nothing
    is known: nobody asked, or the gateway sends it nothing because it can't reach it.

    >>> judge(Counts(answered=0, failed=3, seconds=0), Counts(answered=9, failed=0, seconds=1), 1.0, PromoteSpec())
    '3 of 3 requests failed (100.0 %), of the old model 0 of 9 (0.0 %), allowed are 2.0 % more'
    """
    worse = new.error_rate > old.error_rate + spec.max_error_excess
    if new.failed >= _ENOUGH_TO_FAIL and worse:
        return _say_errors(new, old, spec)
    if elapsed_s < spec.canary_s and new.total < spec.canary_requests:
        return "wait"
    if worse:
        return _say_errors(new, old, spec)
    if not new.answered:
        return (
            f"it answered no request in {elapsed_s:.0f} s (the old model {old.answered}), so nothing says how it does: "
            f"send it some, raise canary_s, or set canary_share to 0 to take verify's and evaluate's word alone"
        )
    allowed_s = old.mean_s * spec.max_latency_ratio + _GRACE_S
    if old.answered and new.answered and new.mean_s > allowed_s:
        return (
            f"an answer took {new.mean_s:.3f} s on the mean of {new.answered}, of the old model {old.mean_s:.3f} s on "
            f"that of {old.answered}, allowed are {allowed_s:.3f} s"
        )
    return "pass"


def _say_errors(new: Counts, old: Counts, spec: PromoteSpec) -> str:
    return (
        (
            f"{new.failed} of {new.total} requests failed ({new.error_rate:.1%}), of the old model {old.failed} of "
            f"{old.total} ({old.error_rate:.1%}), allowed are {spec.max_error_excess:.1%} more"
        )
        .replace("%)", " %)")
        .replace("% more", " % more")
    )
