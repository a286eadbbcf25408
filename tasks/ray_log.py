"""Which lines of a Ray job's log are new: its API tells the log as a whole, and newer Rays only the last 16 MiB of it.

    answer of /api/jobs/ID/logs -> JobLog.take() -> lines that were not told yet

An answer that was cut begins with a notice in place of its first lines, so an offset into it means nothing: it is
continued behind the last lines that were told.

Ring: pure.  Units: offsets are characters of an answer.
"""

from collections import deque
from collections.abc import Callable, Sequence

CUT = "[LOG TRUNCATED"  # how the notice begins
_NUM_LAST = 50  # lines by which the place in a cut answer is known again


class JobLog:
    r"""The log of one job, as far as it was told.

    >>> log = JobLog()
    >>> log.take("one\ntwo\nthr"), log.take("one\ntwo\nthree\n")
    (['one', 'two'], ['three'])
    >>> log.take("[LOG TRUNCATED to 16 MiB]\ntwo\nthree\nfour\n")
    ['four']
    """

    def __init__(self, read_kept: Callable[[], Sequence[str]] = tuple) -> None:
        """`read_kept` returns the lines that an earlier follower of the job wrote down; asked for a cut log only."""
        self._read_kept = read_kept
        self._offset = 0
        self._last: deque[str] = deque(maxlen=_NUM_LAST)

    def take(self, text: str, *, is_whole: bool = False) -> list[str]:
        """Return the whole lines that are new; a torn last line waits unless the log `is_whole`.

        Of a log whose beginning was cut before the first look, the kept lines stand in for what is missing. Where
        lines are missing nevertheless, the notice stands before the next one.
        """
        end = len(text) if is_whole else text.rfind("\n") + 1
        if text.startswith(CUT):
            return self._take_cut(text[:end].splitlines())
        new = text[self._offset : end].splitlines()
        self._offset = max(self._offset, end)
        self._last.extend(new)
        return new

    def _take_cut(self, lines: list[str]) -> list[str]:
        kept = [] if self._last else list(self._read_kept())
        self._last.extend(line for line in kept if not line.startswith(CUT))
        notice, lines = lines[:1], lines[1:]
        begin = _find_end(lines, list(self._last))
        new = lines[begin:]
        self._last.extend(new)
        return [*kept, *([] if begin else notice), *new]


def _find_end(lines: list[str], last: list[str]) -> int:
    """Return the offset behind the last place where `lines` hold the `last` ones, also in part at their start; or 0."""
    if last:
        for end in range(len(lines), 0, -1):
            count = min(len(last), end)
            if lines[end - 1] == last[-1] and lines[end - count : end] == last[-count:]:
                return end
    return 0
