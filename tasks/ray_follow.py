"""Follow a job of a Ray cluster to its end over lost connections, and stop it.

    RayJobs + Job -> submit() -> follow() -> JobState
                     stop_job(), try_to_stop()

What a dashboard does not answer now is asked again, less and less often, for as long as a Patience says.

Ring: edge (network).  Units: seconds.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tasks.errors import MissingError, TataraError, TransientError
from tasks.ray_jobs import Job, JobState, Node, RayJobs
from tasks.ray_log import JobLog

_LOG_CHARS_PER_S = 1 << 20  # the API tells a log only as a whole: a long one is asked for less often
_LONGEST_WAIT_S = 30.0
_LAST_LINES_S = 30.0  # how long the last lines of a job that has ended are asked for
Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How a job is followed. `lost_after_s` is how long a dashboard may be away."""

    poll_s: float = 2.0
    health_s: float = 30.0
    lost_after_s: float = 900.0


CANCEL = Patience(poll_s=0.5, lost_after_s=20.0)  # Prefect's worker kills a cancelled flow after 30 s


def ask_patiently(
    ask: Callable[[], Answer], patience: Patience, on_silence: Callable[[TransientError], None] = lambda error: None
) -> Answer:
    """Ask until there is an answer; `on_silence` hears of the first time that there is none.

    Raises: the last TransientError when there is none for `lost_after_s`; every other error at once.
    """
    deadline, wait_s, is_said = time.monotonic() + patience.lost_after_s, patience.poll_s, False
    while True:
        try:
            return ask()
        except TransientError as error:
            if time.monotonic() > deadline:
                raise
            if not is_said:
                on_silence(error)
            is_said = True
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        time.sleep(min(wait_s, max(0.1, deadline - time.monotonic())))


def submit(jobs: RayJobs, job: Job, patience: Patience) -> None:
    """Submit a job once, however often the answer is lost. Raises TransientError after `lost_after_s`."""
    state = ask_patiently(lambda: jobs.ensure(job), patience)
    logger.info("job %s on %s: %s", job.submission_id, jobs.url, state.status)


def follow(
    jobs: RayJobs,
    submission_id: str,
    patience: Patience,
    on_line: Callable[[str], None],
    on_health: Callable[[list[Node]], None],
    read_kept: Callable[[], Sequence[str]] = tuple,
) -> JobState:
    """Tell a job's lines from its first one until it ends; return how.

    A dashboard that is away is asked again, less and less often, and said once when it goes and when it is back. Only
    the job's state counts: a log or a list of nodes that can't be had is done without. `read_kept` returns the lines
    that an earlier follower wrote down, for a log whose beginning Ray tells no more.
    Raises: TransientError when it is away for `lost_after_s`, or is back and knows no such job. The job is left alone.
    """
    lines = _Lines(jobs, submission_id, on_line, JobLog(read_kept))
    lost_since, wait_s, looked = 0.0, patience.poll_s, float("-inf")
    while True:
        try:
            state = jobs.find(submission_id)  # before the log: what an ended job printed is all there
        except TransientError as error:
            now = time.monotonic()
            lost_since = lost_since or now
            if wait_s == patience.poll_s:
                logger.warning(
                    "the cluster does not answer (%s): job %s goes on there, asking again", error, submission_id
                )
            if now - lost_since > patience.lost_after_s:
                raise TransientError(
                    f"{jobs.url} did not answer for {now - lost_since:.0f} s ({error}); job {submission_id} was left "
                    "alone: the next run follows it"
                ) from error
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            time.sleep(wait_s)
            continue
        if lost_since:
            logger.info("the cluster answers again after %.0f s", time.monotonic() - lost_since)
            lost_since = 0.0
        if state is None:
            raise TransientError(f"{jobs.url} knows no job {submission_id} any more: the cluster was started anew")
        if time.monotonic() - looked > patience.health_s:
            looked = time.monotonic()
            count_nodes(jobs, on_health)
        if state.is_done:
            lines.tell_last(patience)
            return state
        wait_s = patience.poll_s
        time.sleep(max(wait_s, lines.tell() / _LOG_CHARS_PER_S))


def count_nodes(jobs: RayJobs, on_health: Callable[[list[Node]], None]) -> None:
    """Hand the living nodes on, if the cluster tells them now: a job goes on without."""
    try:
        nodes = jobs.nodes()
    except TransientError as error:
        logger.debug("the nodes could not be counted: %s", error)
        return
    on_health(nodes)


def stop_job(
    jobs: RayJobs,
    submission_id: str,
    patience_s: float,
    patience: Patience,
    on_silence: Callable[[TransientError], None] = lambda error: None,
) -> bool:
    """Stop a job and wait `patience_s` for its end; return whether it has ended, or is not known any more.

    `patience` is that with a cluster that does not answer, of which `on_silence` hears.
    Raises: TransientError when it does not answer for so long, AccessError or ServiceError when it refuses.
    """

    def is_over() -> bool:
        state = ask_patiently(lambda: jobs.find(submission_id), patience, on_silence)
        return state is None or state.is_done

    if is_over():
        return True
    try:
        ask_patiently(lambda: jobs.stop(submission_id), patience, on_silence)
    except MissingError:
        return True
    deadline = time.monotonic() + patience_s
    while not is_over():
        if time.monotonic() > deadline:
            logger.warning("job %s still runs %g s after it was told to stop", submission_id, patience_s)
            return False
        time.sleep(0.2)
    logger.info("job %s was stopped", submission_id)
    return True


def try_to_stop(jobs: RayJobs, submission_id: str, patience_s: float) -> bool:
    """Stop a job that a person cancelled, before we are killed ourselves; say so when that is not possible."""
    jobs.hurry()
    try:
        return stop_job(jobs, submission_id, patience_s, CANCEL)
    except TataraError as error:
        logger.error(
            "Ray job %s may still run: `ray job stop --address %s %s` (%s)",
            *(submission_id, jobs.url, submission_id, error),
        )
        return False


class Health:
    """Whether nodes of the cluster were lost: said at once, and once, with what it means."""

    def __init__(self, meaning: str) -> None:
        self._meaning = meaning
        self.lost: dict[str, str] = {}
        self._known: dict[str, str] = {}

    def __call__(self, nodes: list[Node]) -> None:
        """Take what lives now."""
        alive = {node.node_id: node.address for node in nodes}
        for node_id in self._known.keys() - alive.keys():
            self.lost[node_id] = self._known[node_id]
            logger.error(
                "node %s (%s) of the cluster is lost, %d are left: %s",
                *(self._known[node_id], node_id[:8], len(alive), self._meaning),
            )
        self._known = alive


def last_lines(text: str, count: int = 30) -> str:
    """Return the end of a log for an error message."""
    return "\n".join(text.splitlines()[-count:]) or "(no output)"


class _Lines:
    """The lines of a job, told as far as they can be had.

    Ray reads a log as UTF-8 and answers 500 for ever once one byte of it is none: no fault of the job.
    """

    def __init__(self, jobs: RayJobs, submission_id: str, on_line: Callable[[str], None], log: JobLog) -> None:
        self._jobs, self._id, self._on_line, self._log = jobs, submission_id, on_line, log
        self._failures = 0

    def tell(self) -> int:
        """Tell what is new; return the length of the whole log."""
        try:
            text = self._jobs.logs(self._id)
        except TataraError as error:
            self._failures += 1
            if self._failures == 2:  # the first may be a lost connection, which is said as one
                self._warn(error)
            return 0
        self._failures = 0
        return self._hand_on(text, is_whole=False)

    def tell_last(self, patience: Patience) -> None:
        """Tell all that is left of a job that has ended."""
        briefly = Patience(poll_s=patience.poll_s, lost_after_s=min(patience.lost_after_s, _LAST_LINES_S))
        try:
            text = ask_patiently(lambda: self._jobs.logs(self._id), briefly)
        except TataraError as error:
            if self._failures < 2:
                self._warn(error)
            return
        self._hand_on(text, is_whole=True)

    def _hand_on(self, text: str, *, is_whole: bool) -> int:
        for line in self._log.take(text, is_whole=is_whole):
            self._on_line(line)
        return len(text)

    def _warn(self, error: TataraError) -> None:
        logger.warning(
            "the log of job %s can't be read (%s; one byte that is no UTF-8 is enough): it is followed by its state, "
            "without its lines",
            *(self._id, error),
        )
