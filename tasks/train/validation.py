"""Which step was best, and whether training has gone on for long enough without a better one.

Both are read from the evaluations so far, which each checkpoint carries: a resumed run decides as the one that was
never interrupted.

Ring: pure.
"""

from collections.abc import Sequence
from typing import Any

Evaluation = tuple[int, float]  # step, validation loss


def evaluations(log_history: Sequence[dict[str, Any]]) -> list[Evaluation]:  # Any: Trainer's records
    """Return step and validation loss of each evaluation in Trainer's history."""
    return [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]


def best_step(done: Sequence[Evaluation], min_delta: float = 0.0) -> int:
    """Return the step of the lowest loss; a later one counts only when it is lower by more than `min_delta`. 0: none.

    >>> best_step([(10, 2.0), (20, 1.5), (30, 1.49), (40, 1.6)], min_delta=0.1)
    20
    """
    best, lowest = 0, float("inf")
    for step, loss in done:
        if loss < lowest - (min_delta if best else 0.0):
            best, lowest = step, loss
    return best


def is_over(done: Sequence[Evaluation], patience: int, min_delta: float = 0.0) -> bool:
    """Say whether the last `patience` evaluations brought no new best; patience 0: never.

    >>> is_over([(10, 2.0), (20, 1.5), (30, 1.6), (40, 1.7)], 2), is_over([(10, 2.0), (20, 1.5), (30, 1.6)], 2)
    (True, False)
    """
    if not patience or not done:
        return False
    best = best_step(done, min_delta)
    return sum(step > best for step, _ in done) >= patience
