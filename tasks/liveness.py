"""Tell a hang from a slow step, from what a heartbeat says and when it last changed.

    beats -> Liveness.judge() -> "" | "slow ..." | raises HangError

- the heartbeat goes on, its count does not: the process lives, its step is slow (said once a step), and after
  `stall_timeout_s` without progress its main thread hangs;
- the heartbeat itself stands still: the whole process is stopped or stuck (`heartbeat_timeout_s`).

Only changes count, by the watcher's own clock: a clock that jumps, or differs, tells nothing wrong.

Ring: pure (time comes in as an argument).  Units: seconds.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

_SLOW_FACTOR = 10.0  # times the median step
_SLOW_AT_LEAST_S = 30.0


class HangError(Exception):
    """The process gives no sign of life, or makes no progress."""


@dataclass(slots=True, kw_only=True)
class Liveness:
    """What is known of one process. `now` is the watcher's monotonic clock."""

    stall_timeout_s: float
    heartbeat_timeout_s: float
    now: float
    _beat: float = field(init=False)
    _moved: float = field(init=False)
    _last: dict[str, Any] = field(default_factory=dict)  # Any: JSON values
    _step_began: tuple[int, float] = (0, 0.0)
    _steps_s: list[float] = field(default_factory=list)
    _said: int = -1

    def __post_init__(self) -> None:
        self._beat = self._moved = self.now
        self._step_began = (-1, self.now)

    def see_progress(self, now: float) -> None:
        """Note output or metrics: a sign of life that needs no heartbeat."""
        self._moved = self._beat = now

    def see_beat(self, beat: dict[str, Any], now: float) -> None:  # Any: JSON values
        """Note the heartbeat as it is read; none, or the same one again, is no sign."""
        if not beat or beat == self._last:
            return
        self._beat = now
        if beat.get("count") != self._last.get("count"):
            self._moved = now
        step = beat.get("step", 0)
        if step != self._step_began[0]:
            if self._step_began[0] >= 0:
                self._steps_s = [*self._steps_s[-31:], now - self._step_began[1]]
            self._step_began = (step, now)
        self._last = beat

    def judge(self, now: float) -> str:
        """Return what is worth a line in the log, mostly nothing. Raises HangError."""
        phase, step = self._last.get("phase", "start"), self._last.get("step", 0)
        if self._last and now - self._beat > self.heartbeat_timeout_s:
            raise HangError(
                f"its heartbeat stands still for {now - self._beat:.0f} s (phase {phase}, step {step}): the process is "
                "stopped or stuck"
            )
        still = now - self._moved
        if still > self.stall_timeout_s:
            alive = (
                f"its heartbeat goes on, but in phase {phase} of step {step} nothing moves: it" if self._last else "it"
            )
            raise HangError(f"no progress for {still:.0f} s: {alive} hangs")
        usual = median(self._steps_s) if self._steps_s else 0.0
        if self._last and step != self._said and usual and still > max(_SLOW_FACTOR * usual, _SLOW_AT_LEAST_S):
            self._said = step
            return (
                f"step {step} is slow ({phase}, {still:.0f} s without progress, {usual:.1f} s are usual), but it lives"
            )
        return ""
