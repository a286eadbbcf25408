"""Read verl's console lines: `step:3 - critic/score/mean:0.25 - actor/ppo_kl:0.0 ...` into a metrics record.

Ring: pure.
"""

import math
import re
from typing import Any

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"(?:^|\s)step:(\d+)((?: - [^\s:][^:]*:\S+)+)\s*$")
_VALUE = re.compile(r" - ([^\s:][^:]*):(?:np\.\w+\()?([^\s)]+)\)?")
_REWARDS = ("critic/score/mean", "critic/rewards/mean")
_TEST_SCORES = ("val-core/", "val/test_score/")


def read_step(line: str) -> tuple[int, dict[str, float]] | None:
    r"""Return the step and verl's values of a line, None for any other line.

    >>> read_step("\x1b[36m(TaskRunner pid=7)\x1b[0m step:2 - critic/score/mean:0.5 - perf/mfu:np.float64(0.25)")
    (2, {'critic/score/mean': 0.5, 'perf/mfu': 0.25})
    >>> read_step("Training Progress: 10%")
    """
    found = _STEP.search(_COLOUR.sub("", line))
    if not found:
        return None
    values: dict[str, float] = {}
    for name, said in _VALUE.findall(found[2]):
        try:
            value = float(said)
        except ValueError:
            continue
        if math.isfinite(value):  # JSON has no word for the others
            values[name] = value
    return int(found[1]), values


def make_record(
    step: int, values: dict[str, float], num_steps: int, attempt: int
) -> dict[str, Any]:  # Any: JSON values
    """Return the record of metrics.jsonl: the step, its reward, the test score where there is one, all that verl said.

    >>> make_record(2, {"critic/score/mean": 0.5}, 9, 1)
    {'step': 2, 'num_steps': 9, 'attempt': 1, 'reward': 0.5, 'verl': {'critic/score/mean': 0.5}}
    """
    record: dict[str, Any] = {"step": step, "num_steps": num_steps, "attempt": attempt}
    reward = next((values[name] for name in _REWARDS if name in values), None)
    if reward is not None:
        record["reward"] = reward
    score = test_score(values)
    if score is not None:
        record["test_score"] = score
    return {**record, "verl": values}


def test_score(values: dict[str, float]) -> float | None:
    """Return the mean score on the test questions, None where a step was not tested.

    >>> test_score({"val-core/openai/gsm8k/acc/mean@1": 0.25, "val-core/openai/gsm8k/reward/mean@1": 0.5})
    0.5
    """
    names = sorted(name for name in values if name.startswith(_TEST_SCORES))
    wanted = [name for name in names if "/reward/" in name] or names
    return values[wanted[0]] if wanted else None
