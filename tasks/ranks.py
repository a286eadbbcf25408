"""Which of many processes died or hangs: read from what torchrun prints, and from each rank's heartbeat.

    output.log -> find_failed() -> FailedRank, lines_of() -> its last lines
    heartbeats -> say_ranks()   -> "rank 1 on n2: step 5 (train), silent for 40 s; ..."

Ring: pure.  Units: seconds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

_FAILURE = re.compile(
    r"\[\d+\]:\s*\n\s*time\s*: (?P<time>\S+)\s*\n\s*host\s*: (?P<host>\S+)\s*\n\s*rank\s*: (?P<rank>\d+) "
    r"\(local_rank: \d+\)\s*\n\s*exitcode\s*: (?P<code>-?\d+)"
)
_SIGNALS = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}
_KILLED = {-7, -9, -11}  # no SIGABRT: NCCL ends with it whoever waits for a rank that is gone
_TOGETHER = timedelta(seconds=5)  # clocks of nodes differ, and torchrun tells whole seconds
_TOLD = 8  # ranks that are told one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRank:
    """The rank that failed first, as torchrun saw it."""

    rank: int
    host: str
    code: int

    def __str__(self) -> str:
        """Say who it was and how it ended."""
        how = f"exit status {self.code}"
        if self.code < 0:
            how = f"killed by {_SIGNALS.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} on {self.host} ended first ({how})"


def find_failed(text: str) -> FailedRank | None:
    """Return the rank that failed first of all that torchrun lists, on whatever node; None when it lists none.

    >>> table = '''[0]:
    ...   time      : 2026-01-01_00:00:0{}
    ...   host      : n{}
    ...   rank      : {} (local_rank: 0)
    ...   exitcode  : {} (pid: 9)
    ... '''
    >>> str(find_failed(table.format(7, 1, 0, 1) + table.format(5, 2, 1, -9)))
    'rank 1 on n2 ended first (killed by SIGKILL)'
    """
    found = [match.groupdict() for match in _FAILURE.finditer(text)]
    if not found:
        return None
    found.sort(key=_time)
    early = [one for one in found if _time(one) - _time(found[0]) <= _TOGETHER]
    first = next((one for one in early if int(one["code"]) in _KILLED), early[0])  # a kill before what it caused
    return FailedRank(rank=int(first["rank"]), host=first["host"], code=int(first["code"]))


def lines_of(text: str, rank: int, count: int = 20) -> list[str]:
    r"""Return the last lines that one rank wrote.

    >>> lines_of("[rank0] a\n[rank1] b\nsrun: error\n[rank1] c\n", 1)
    ['b', 'c']
    """
    head = f"[rank{rank}] "
    return [line.removeprefix(head) for line in text.splitlines() if line.startswith(head)][-count:]


def say_ranks(beats: Sequence[Mapping[str, Any]], now: float) -> str:  # Any: JSON values
    """Say where each rank stands, those that got least far first; clocks of nodes may differ by seconds.

    >>> beats = [{"rank": rank, "host": "n1", "step": 5 - rank, "phase": "train", "time": 90.0} for rank in (0, 1)]
    >>> say_ranks(beats, 100.0)
    'rank 1 on n1: step 4 (train), last sign 10 s ago; rank 0 on n1: step 5 (train), last sign 10 s ago'
    """
    order = sorted(beats, key=lambda beat: (beat.get("step", 0), beat.get("count", 0), beat.get("time", 0.0)))
    told = [
        f"rank {beat.get('rank', 0)} on {beat.get('host', '?')}: step {beat.get('step', 0)} "
        f"({beat.get('phase', '?')}), last sign {max(0.0, now - beat.get('time', now)):.0f} s ago"
        for beat in order
    ]
    more = [f"{len(told) - _TOLD} others"] if len(told) > _TOLD else []
    return "; ".join([*told[:_TOLD], *more])


def _time(one: Mapping[str, str]) -> datetime:
    return datetime.strptime(one["time"], "%Y-%m-%d_%H:%M:%S")
