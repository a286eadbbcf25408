"""The gateway's settings of its traces: environment variables, read once and validated at start.

    os.environ -> TraceSettings.from_environment() -> Recorder

What is taken out, what is kept, and what happens while the disk is full. (Where traces go and how
they are synced is in settings.py.)

Ring: pure (the environment comes in as an argument).  Units: bytes, shares 0..1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from deployments.gateway.settings import _flag, _setting, _whole
from tasks.errors import SpecError
from tasks.traces.redaction import KINDS


def _kinds(text: str) -> frozenset[str]:
    kinds = frozenset(part.strip().lower() for part in text.split(",") if part.strip())
    if kinds == {"none"}:
        return frozenset()
    if unknown := sorted(kinds - frozenset(KINDS)):
        raise ValueError(f"{unknown[0]!r} is no kind; expected some of {','.join(KINDS)}, or none")
    return kinds


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise ValueError("expected a share 0..1")
    return value


def _bodies(text: str) -> str:
    if text.lower() not in ("full", "none"):
        raise ValueError("expected full or none")
    return text.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What becomes of a trace before it is written, and while it can't be."""

    kinds: frozenset[str] = _setting(
        "GATEWAY_REDACT",
        frozenset({"secrets"}),
        _kinds,
        f"what is taken out of traces: some of {', '.join(KINDS)}; none",
    )
    patterns: Path | None = _setting(  # noqa: RUF009 - the same
        "GATEWAY_REDACT_PATTERNS", None, Path, "a file with one more regular expression per line to take out"
    )
    sample_rate: float = _setting(
        "GATEWAY_TRACE_SAMPLE", 1.0, _share, "share of the successful answers that is kept; failures always are"
    )
    bodies: str = _setting("GATEWAY_TRACE_BODIES", "full", _bodies, "none: neither request nor answer, only metadata")
    hold_records: int = _setting(
        "GATEWAY_TRACE_HOLD_RECORDS", 10_000, _whole(0, 10_000_000), "most traces in memory while the disk is full"
    )
    hold_bytes: int = _setting(
        "GATEWAY_TRACE_HOLD_BYTES", 64 << 20, _whole(0, 1 << 36), "most bytes of them; beyond it a trace is lost"
    )
    direct: bool = _setting(
        "GATEWAY_TRACE_DIRECT", False, _flag, "send to Weave at once, by a process beside the gateway"
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read every variable that is set and not empty; all faults in one SpecError."""
        values: dict[str, Any] = {}  # Any: each setting has its own type
        faults: list[str] = []
        for setting in fields(cls):
            name = setting.metadata["env"]
            if not (text := environ.get(name, "").strip()):
                continue
            try:
                values[setting.name] = setting.metadata["parse"](text)
            except ValueError as error:
                faults.append(f"{name}={text!r}: {error}")
        if faults:
            raise SpecError(f"{'; '.join(faults)}; correct or unset {'it' if len(faults) == 1 else 'them'}")
        return cls(**values)


def trace_settings_table() -> str:
    """Return the settings as a Markdown table, for the documentation.

    >>> trace_settings_table().splitlines()[2].split("|")[1:3]
    [' `GATEWAY_REDACT` ', ' `secrets` ']
    """
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for setting in fields(TraceSettings):
        default: Any = setting.default  # Any: each setting has its own type
        default = ",".join(sorted(default)) if isinstance(default, frozenset) else default
        default = str(default).lower() if isinstance(default, bool) else default
        shown = "unset" if default is None else f"`{default}`"
        rows.append(f"| `{setting.metadata['env']}` | {shown} | {setting.metadata['about']} |")
    return "\n".join(rows)
