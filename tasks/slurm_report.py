"""What SLURM says of a job, read from `scontrol show job` or `sacct`, and what it means for a training.

    scontrol show job --oneliner -> read_job()        -> JobReport
    sacct --parsable2            -> read_accounting() -> JobReport

Ring: pure.
"""

import re
from dataclasses import dataclass, replace

_FIELD = re.compile(r"(?:^| )(JobId|JobName|JobState|Reason|Restarts|ExitCode|NodeList|StartTime|Comment)=(\S*)")
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
_ACTIVE = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED", "SUSPENDED"})
_LOST = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"})
_WHY = {
    "NODE_FAIL": "a node was lost",
    "BOOT_FAIL": "a node did not start",
    "PREEMPTED": "a job of higher priority took its nodes",
    "TIMEOUT": "its time limit was over",
    "DEADLINE": "its deadline was over",
    "OUT_OF_MEMORY": "a node ran out of memory",
    "CANCELLED": "it was cancelled (scancel)",
    "REVOKED": "its cluster gave it up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One look at a job. An empty state: SLURM has forgotten it."""

    job_id: str
    name: str = ""
    state: str = ""
    reason: str = ""
    restarts: int = 0
    exit_code: str = ""
    nodes: str = ""
    starts_at: str = ""
    comment: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it stands in the queue."""
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        """Whether it will never run again."""
        return self.state not in _WAITING | _ACTIVE

    @property
    def is_running(self) -> bool:
        """Whether its processes may be expected to get on."""
        return self.state == "RUNNING"

    @property
    def is_lost(self) -> bool:
        """Whether it ended by no fault of its own, so that another try is worth it."""
        return self.state in _LOST

    def say(self) -> str:
        """Write it in a line.

        >>> JobReport(job_id="7", state="PENDING", reason="Resources").say()
        'SLURM job 7 is queued (Resources)'
        >>> JobReport(job_id="7", state="RUNNING", nodes="n[1-2]", restarts=1).say()
        'SLURM job 7 runs on n[1-2], requeued once'
        """
        again = {0: "", 1: ", requeued once"}.get(self.restarts, f", requeued {self.restarts} times")
        if self.is_waiting:
            start = f", to start {self.starts_at}" if self.starts_at else ""
            reason = self.reason or self.state
            return f"SLURM job {self.job_id} is queued ({reason}{start}){again}"
        if self.is_running:
            return f"SLURM job {self.job_id} runs on {self.nodes}{again}"
        if not self.state:
            return f"SLURM job {self.job_id} is known to SLURM no more"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"SLURM job {self.job_id} is {self.state}{where}{again}"

    def say_end(self) -> str:
        """Write how it ended."""
        why = _WHY.get(self.state) or (f"exit code {self.exit_code}" if self.exit_code else self.state or "unknown")
        state = self.state or "forgotten by SLURM"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"SLURM job {self.job_id} ended as {state}{where}: {why}"


def read_job(line: str) -> JobReport:
    """Read a line of `scontrol show job --oneliner`.

    >>> job = read_job("JobId=7 JobName=x JobState=PENDING Reason=Resources Restarts=1 ExitCode=0:0 NodeList=(null)")
    >>> job.job_id, job.state, job.reason, job.restarts, job.nodes
    ('7', 'PENDING', 'Resources', 1, '')
    """
    found = {name: value for name, value in _FIELD.findall(line) if value not in ("(null)", "None", "Unknown")}
    return JobReport(
        job_id=found.get("JobId", ""),
        name=found.get("JobName", ""),
        state=found.get("JobState", ""),
        reason=found.get("Reason", ""),
        restarts=int(found.get("Restarts", "0")),
        exit_code=found.get("ExitCode", ""),
        nodes=found.get("NodeList", ""),
        starts_at=found.get("StartTime", ""),
        comment=found.get("Comment", ""),
    )


def read_accounting(job_id: str, lines: str) -> JobReport:
    """Read `sacct --parsable2 --noheader --format=State,ExitCode,NodeList`; of a requeued job the last line counts.

    >>> read_accounting("7", "CANCELLED by 0|0:15|n[1-2]").state
    'CANCELLED'
    """
    rows = [line.split("|") for line in lines.splitlines() if line.count("|") == 2]
    blank = JobReport(job_id=job_id)
    if not rows:
        return blank
    state, code, nodes = rows[-1]
    return replace(blank, state=state.partition(" ")[0], exit_code=code, nodes=nodes.replace("None assigned", ""))


def is_passing(words: str) -> bool:
    """Say whether SLURM's own words mean that it is away for a moment.

    >>> is_passing("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")
    True
    >>> is_passing("sbatch: error: Batch job submission failed: Invalid partition name specified")
    False
    """
    signs = (
        *("unable to contact", "timed out", "temporarily", "connection refused", "connect failure", "communication"),
        *("socket", "zero bytes", "transport endpoint", "munge encode failed", "connection reset"),
    )
    return any(sign in words.lower() for sign in signs)


def is_unknown(words: str) -> bool:
    """Say whether SLURM's own words mean that there is no such job (any more).

    >>> is_unknown("slurm_load_jobs error: Invalid job id specified")
    True
    """
    return "invalid job id" in words.lower()
