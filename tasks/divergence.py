"""Say when a loss explodes: a rule that an ordinary run never meets.

A loss explodes when it is above `factor` times the running median of the ordinary losses before it *and* above the
first loss of the run: a run that overfits has a tiny median, and one hard batch may be many times that without harm.
`steps` exploding losses in a row end the run; one spike does not.

Ring: pure.
"""

import math
from collections.abc import Sequence
from statistics import median

_WINDOW, _AT_LEAST, _LOOK = 50, 5, 150


def count_exploding(losses: Sequence[float], factor: float) -> int:
    """Return how many losses at the end, in a row, explode. A loss that is not finite does. factor 0: none.

    >>> count_exploding([4.0, 3.9, 3.7, 3.8, 3.6, 20.0, 30.0], 3.0)
    2
    >>> count_exploding([4.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 3.0], 3.0)
    0
    """
    ordinary: list[float] = []
    streak = 0
    for loss in losses[-_LOOK:]:
        usual = median(ordinary[-_WINDOW:]) if len(ordinary) >= _AT_LEAST else math.inf
        is_high = factor > 0 and loss > factor * usual and loss > losses[0]
        if not math.isfinite(loss) or is_high:
            streak += 1
        else:
            streak = 0
            ordinary.append(loss)
    return streak
