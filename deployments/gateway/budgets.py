"""What each key may still ask: requests per minute, tokens per day.

    Budgets.take(name, limits, now) -> None, or seconds to wait      Budgets.charge(name, tokens, now)

Requests: at most N in any 60 s, exactly. Tokens: counted when an answer ends, by UTC day, so requests
that run at the same time may overshoot by what they are worth; the next one is refused.

Ring: pure (the time comes in as an argument).  Units: seconds since the epoch.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_MINUTE_S, _DAY_S = 60.0, 86400


class Budgets:
    """What was used, by the name of the key."""

    def __init__(self) -> None:
        self.has_changed = False
        self._asked: dict[str, deque[float]] = {}
        self._tokens: dict[str, int] = {}
        self._day = 0

    def take(self, name: str, requests_per_minute: int, tokens_per_day: int, now_s: float) -> tuple[str, int] | None:
        """Take one request; return None, or which budget is used up and in how many seconds to come back.

        A budget of 0 has no limit.

        >>> budgets = Budgets()
        >>> [budgets.take("a", 2, 0, now) for now in (0.0, 1.0, 2.0, 60.5)]
        [None, None, ('requests_per_minute', 58), None]
        """
        if tokens_per_day and self._used(name, now_s) >= tokens_per_day:
            return "tokens_per_day", math.ceil(_DAY_S - now_s % _DAY_S)
        if requests_per_minute:
            asked = self._asked.setdefault(name, deque())
            while asked and asked[0] <= now_s - _MINUTE_S:
                asked.popleft()
            if len(asked) >= requests_per_minute:
                return "requests_per_minute", max(1, math.ceil(asked[0] + _MINUTE_S - now_s))
            asked.append(now_s)
        return None

    def charge(self, name: str, tokens: int, now_s: float) -> None:
        """Count the tokens of an answer."""
        self._tokens[name] = self._used(name, now_s) + tokens
        self.has_changed = True

    def to_json(self) -> dict[str, Any]:  # Any: a number and a table
        """Return what must survive a restart."""
        return {"day": self._day, "tokens": dict(self._tokens)}

    def restore(self, value: Mapping[str, Any]) -> None:  # Any: what a file holds
        """Take what `to_json` gave; anything else counts as nothing used."""
        tokens, day = value.get("tokens"), value.get("day")
        if isinstance(tokens, dict) and isinstance(day, int):
            self._tokens = {str(name): count for name, count in tokens.items() if isinstance(count, int)}
            self._day = day

    def _used(self, name: str, now_s: float) -> int:
        day = int(now_s // _DAY_S)
        if day != self._day:
            self._day, self._tokens = day, {}
        return self._tokens.get(name, 0)
