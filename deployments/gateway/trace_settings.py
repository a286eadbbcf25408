"""The gateway's settings of its traces: environment variables, read once and validated at start.

    os.environ -> TraceSettings.from_environment() -> Recorder

What is taken out, what is kept, and what happens while the disk is full. (Where traces go and how
they are synced is in settings.py.)

Ring: pure (the environment comes in as an argument).  Units: bytes, shares 0..1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deployments.gateway.variables import flag, number, one_of, read, setting, table, whole
from tasks.traces.redaction import KINDS


def _kinds(text: str) -> frozenset[str]:
    kinds = frozenset(part.strip().lower() for part in text.split(",") if part.strip())
    if kinds == {"none"}:
        return frozenset()
    if unknown := sorted(kinds - frozenset(KINDS)):
        raise ValueError(f"{unknown[0]!r} is no kind; expected some of {','.join(KINDS)}, or none")
    return kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What becomes of a trace before it is written, and while it can't be."""

    kinds: frozenset[str] = setting(
        "GATEWAY_REDACT",
        frozenset({"secrets"}),
        _kinds,
        f"what is taken out of traces: some of {', '.join(KINDS)}; none",
    )
    patterns: Path | None = setting(  # noqa: RUF009 - the same
        "GATEWAY_REDACT_PATTERNS", None, Path, "a file with one more regular expression per line to take out"
    )
    sample_rate: float = setting(
        "GATEWAY_TRACE_SAMPLE",
        1.0,
        number(lambda value: 0 <= value <= 1, "a share 0..1"),
        "share of the successful answers that is kept; failures always are",
    )
    bodies: str = setting(
        "GATEWAY_TRACE_BODIES", "full", one_of("full", "none"), "none: neither request nor answer, only metadata"
    )
    hold_records: int = setting(
        "GATEWAY_TRACE_HOLD_RECORDS", 10_000, whole(0, 10_000_000), "most traces in memory while the disk is full"
    )
    hold_bytes: int = setting(
        "GATEWAY_TRACE_HOLD_BYTES", 64 << 20, whole(0, 1 << 36), "most bytes of them; beyond it a trace is lost"
    )
    direct: bool = setting(
        "GATEWAY_TRACE_DIRECT", False, flag, "send to Weave at once, by a process beside the gateway"
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read every variable that is set and not empty; all faults in one SpecError."""
        return read(cls, environ)


def trace_settings_table() -> str:
    """Return the settings as a Markdown table, for the documentation.

    >>> trace_settings_table().splitlines()[2].split("|")[1:3]
    [' `GATEWAY_REDACT` ', ' `secrets` ']
    """
    return table(TraceSettings)
