"""One look at a job that somebody else's queue runs, SLURM's or Ray's, and what it means for a training.

Ring: pure.
"""

from dataclasses import dataclass

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
    "CANCELLED": "it was cancelled",
    "REVOKED": "its cluster gave it up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One look at a job, in SLURM's words. An empty state: its system has forgotten it."""

    job_id: str
    system: str = "SLURM"
    name: str = ""
    state: str = ""
    reason: str = ""
    restarts: int = 0
    exit_code: str = ""
    nodes: str = ""
    starts_at: str = ""
    comment: str = ""

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"{self.system} job {self.job_id}"

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
            return f"{self.label} is queued ({reason}{start}){again}"
        if self.is_running:
            return f"{self.label} runs on {self.nodes}{again}"
        if not self.state:
            return f"{self.label} is known to {self.system} no more"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"{self.label} is {self.state}{where}{again}"

    def say_end(self) -> str:
        """Write how it ended."""
        why = _WHY.get(self.state) or (f"exit code {self.exit_code}" if self.exit_code else self.state or "unknown")
        state = self.state or f"forgotten by {self.system}"
        if self.state == "CANCELLED":
            why += " (scancel)" if self.system == "SLURM" else " (on Ray's dashboard, or by `ray job stop`)"
        if self.state == "REVOKED" and self.reason:
            why += f" ({self.reason})"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"{self.label} ended as {state}{where}: {why}"
