"""The drain's knobs and what it reports.

Ring: pure.  Units are in the names.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from tasks.errors import AccessError, CapacityError, CorruptError, MissingError, SpecError, TransientError
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
    fallback: Literal["wait", "wandb-offline"] = Field(
        default="wait",
        description="Weave is down: keep everything queued, or write W&B offline runs (then never sent to Weave).",
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
    lag_s: float = 0.0
    lag_before_s: float = 0.0
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
            "lag before and after, seconds": f"{self.lag_before_s:.1f}, {self.lag_s:.1f}",
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        failures = "".join(f"\n- {failure}" for failure in self.failures)
        what_to_do = "\n\n`tatara traces dead list` shows them, `dead replay` or `dead discard` settles them.\n"
        letters = f"\n**Dead letters**\n{failures}{what_to_do}" if failures else ""
        return f"| | |\n|---|---|\n{table}\n{letters}"


_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (TransientError, "Nothing: the queue keeps every record, and the next run goes on there."),
    (AccessError, "Correct the key, entity or project. Until then the queue keeps every record."),
    (MissingError, "Correct entity, project or server. Until then the queue keeps every record."),
    (CapacityError, "Free some space or memory. The queue keeps every record that it has."),
    (CorruptError, "Mend or remove the file that the message names."),
    (SpecError, "Correct the setting that the message names."),
)


def failure_markdown(error: BaseException, lag: tuple[int, str | None] | None, now: datetime) -> str:
    """Write what a failed drain means as a table: lag, what it did before it failed, what to do.

    `lag` is what `TraceQueue.lag` says, None when the queue itself can't be asked.
    """
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), "Read the log of this run.")
    rows = {
        "status": "failed",
        "error": f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "\\|"),
        "before it failed": "; ".join(getattr(error, "__notes__", ())) or "-",
        "still waiting": "unknown" if lag is None else lag[0],
        "lag, seconds": "unknown" if lag is None else f"{lag_seconds(lag[1], now):.1f}",
        "what to do": advice,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n"


def lag_seconds(oldest: str | None, now: datetime) -> float:
    """Return how long ago the oldest waiting record started; 0 when nothing waits.

    >>> lag_seconds("2026-01-01T00:00:00.000000Z", datetime(2026, 1, 1, 0, 1, tzinfo=UTC)), lag_seconds(None, _EPOCH)
    (60.0, 0.0)
    """
    return max(0.0, (now - datetime.fromisoformat(oldest)).total_seconds()) if oldest else 0.0


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
