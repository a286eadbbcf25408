"""The drain's knobs and what it reports.

Ring: pure.  Units are in the names.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from tasks.specs import Positive, Spec


class DrainSpec(Spec):
    """How much one drain does, and how patient it is."""

    batch_records: Positive = Field(default=200, le=1000, description="Calls in one request; Weave takes 1000.")
    batch_bytes: Positive = Field(default=8 << 20, description="Largest body of one request to Weave.")
    call_bytes: Positive = Field(
        default=3 << 20, description="A larger call has its long texts cut; Weave takes 3.5 MiB."
    )
    max_seconds: float = Field(default=240.0, gt=0, description="Stop after so long; the next drain goes on.")
    request_timeout_s: float = Field(default=30.0, gt=0)
    attempts: Positive = Field(default=4, description="Requests for one batch before the drain gives up.")
    grace_s: float = Field(
        default=10.0, ge=0, description="Outcome unknown: wait so long before asking Weave what arrived."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """What one drain did. `status` is "busy" when another drain was at work: nothing was read."""

    status: Literal["drained", "partial", "busy"]
    sink: str
    num_read: int = 0
    num_delivered: int = 0
    num_already_there: int = 0
    num_dead: int = 0
    seconds: float = 0.0
    num_waiting: int = 0
    oldest_waiting: str | None = None
    failures: tuple[str, ...] = ()

    @property
    def records_per_s(self) -> float:
        """Records settled per second."""
        return self.num_read / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:  # Any: plain JSON values
        """Return the report as plain values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Write the report as a table for the Prefect page."""
        rows = {
            "status": self.status,
            "sink": self.sink,
            "records read": self.num_read,
            "delivered": self.num_delivered,
            "found there already": self.num_already_there,
            "dead letters": self.num_dead,
            "seconds": f"{self.seconds:.1f}",
            "records per second": f"{self.records_per_s:.1f}",
            "still waiting": self.num_waiting,
            "oldest waiting since": self.oldest_waiting or "-",
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        failures = "".join(f"\n- {failure}" for failure in self.failures)
        return f"| | |\n|---|---|\n{table}\n" + (f"\n**Dead letters**\n{failures}\n" if failures else "")
