"""What the rewards of a run look like: their distribution, by reward and over time.

Ring: pure.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

_BINS = 20


def reward_distributions(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:  # Any: JSON values
    """Return of each reward its mean, spread and range, a histogram, and the means of the first and last tenth.

    >>> rows = [{"exact": "0"}] * 9 + [{"exact": "1"}]
    >>> found = reward_distributions(rows, ["exact"])["exact"]
    >>> found["mean"], found["first_tenth"], found["last_tenth"], found["counts"][0], found["counts"][-1]
    (0.1, 0.0, 1.0, 9, 1)
    """
    return {name: _distribution([float(row[name]) for row in rows if row.get(name)]) for name in columns}


def _distribution(values: list[float]) -> dict[str, Any]:  # Any: JSON values
    if not values:
        return {"count": 0}
    low, high, tenth = min(values), max(values), max(1, len(values) // 10)
    counts = [0] * (_BINS if high > low else 1)
    width = (high - low) / _BINS or 1.0
    for value in values:
        counts[min(len(counts) - 1, int((value - low) / width))] += 1
    return {
        "count": len(values),
        "mean": fmean(values),
        "std": pstdev(values),
        "min": low,
        "median": median(values),
        "max": high,
        "first_tenth": fmean(values[:tenth]),
        "last_tenth": fmean(values[-tenth:]),
        "counts": counts,
    }


def rewards_markdown(found: Mapping[str, Mapping[str, Any]]) -> str:  # Any: JSON values
    """Return the table for the Prefect UI.

    >>> print(rewards_markdown(reward_distributions([{"exact": "1"}], ["exact"])).splitlines()[-1])
    | exact | 1 | 1.000 | 0.000 | 1.000 | 1.000 | 1.000 | 1.000 |
    """
    lines = ["| reward | completions | mean | std | min | max | first tenth | last tenth |", "|---|" + "---:|" * 7]
    for name, each in found.items():
        if each["count"]:
            shown = (f"{each[key]:.3f}" for key in ("mean", "std", "min", "max", "first_tenth", "last_tenth"))
            lines.append(f"| {name} | {each['count']} | {' | '.join(shown)} |")
    return "\n".join(lines)
