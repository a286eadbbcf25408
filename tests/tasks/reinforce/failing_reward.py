"""A user's reward that fails in the third step, in a process whose own end takes minutes."""

import atexit
import time

_calls: list[int] = []


def score(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Prefer digits, twice."""
    _calls.append(len(completions))
    if len(_calls) == 3:
        atexit.register(time.sleep, 600)
        raise ValueError("no third step")
    return [sum(map(str.isdecimal, text)) / max(1, len(text)) for text in completions]
