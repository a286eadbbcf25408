"""Is a difference between two models more than chance? Paired tests: both saw the same items.

    fixed and broken questions -> sign_test()      McNemar's exact test, one-sided
    losses by document         -> loss_interval()  confidence interval of the difference per token

Ring: pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

from tasks.evaluate.results import DocumentLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference and where it lies with the wanted confidence."""

    value: float
    low: float
    high: float


def sign_test(num_lost: int, num_won: int) -> float:
    """Return how probable it is to lose so many of the questions that changed, when each way is a coin's throw.

    Questions that both models get right, or both wrong, say nothing about the difference.
    Source: McNemar 1947; its exact form is the sign test on the discordant pairs.

    >>> sign_test(5, 0), sign_test(0, 0)
    (0.03125, 1.0)
    """
    total = num_lost + num_won
    return sum(comb(total, k) for k in range(num_lost, total + 1)) / 2**total


def loss_interval(ours: Sequence[DocumentLoss], theirs: Sequence[DocumentLoss], alpha: float) -> Interval:
    """Return theirs - ours in nats per token, with its 1 - alpha interval; above 0: ours is better.

    The documents are the sample, not their tokens, which hang together: the ratio estimator's variance
    (Cochran, Sampling Techniques, section 6.3) over the paired differences. One document: no interval, -inf to inf.
    """
    differences = [theirs_.nats - ours_.nats for ours_, theirs_ in zip(ours, theirs, strict=True)]
    lengths = [document.num_tokens for document in ours]
    count, tokens = len(lengths), sum(lengths)
    value = sum(differences) / tokens
    if count < 2:
        return Interval(value=value, low=-float("inf"), high=float("inf"))
    rest = sum((difference - value * length) ** 2 for difference, length in zip(differences, lengths, strict=True))
    spread = NormalDist().inv_cdf(1 - alpha / 2) * sqrt(count / (count - 1) * rest) / tokens
    return Interval(value=value, low=value - spread, high=value + spread)
