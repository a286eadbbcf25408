"""Settings that are environment variables: how one is declared, read, and shown in the documentation.

    @dataclass with setting(...) fields -> read(cls, os.environ) -> an instance, or one SpecError with all faults
                                        -> table(cls) -> Markdown

Ring: pure (the environment comes in as an argument).
"""

from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from tasks.errors import SpecError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_Settings = TypeVar("_Settings")


def setting(env: str, default: Any, parse: Callable[[str], Any], about: str, *, secret: bool = False) -> Any:
    """Declare one setting: its variable, default, parser and meaning."""  # Any: as dataclasses.field itself
    return field(default=default, repr=not secret, metadata={"env": env, "parse": parse, "about": about})


def flag(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError("expected true or false")
    return text.lower() in _TRUE


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a whole number."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number {low}..{high}")
        return int(text)

    return parse


def number(fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return the parser of a number that must fit.

    >>> number(lambda share: 0 <= share <= 1, "a share 0..1")("0.5")
    0.5
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise ValueError(f"expected {expected}")
        return value

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Return the parser of one of some words."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text.lower()

    return parse


def read(kind: type[_Settings], environ: Mapping[str, str]) -> _Settings:
    """Read every variable that is set and not empty; all faults in one SpecError."""
    values: dict[str, Any] = {}  # Any: each setting has its own type
    faults: list[str] = []
    for each in fields(kind):  # type: ignore[arg-type]  # a dataclass, which has no type of its own
        name = each.metadata["env"]
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            values[each.name] = each.metadata["parse"](text)
        except ValueError as error:
            faults.append(f"{name}={repr(text) if each.repr else '(not shown)'}: {error}")
    if faults:
        raise SpecError(f"{'; '.join(faults)}; correct or unset {'it' if len(faults) == 1 else 'them'}")
    return kind(**values)


def table(kind: type, names: Mapping[Any, str] | None = None) -> str:  # Any: a default
    """Return the settings as a Markdown table; `names` are shown in place of some defaults."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for each in fields(kind):
        rows.append(f"| `{each.metadata['env']}` | {_shown(each.default, names or {})} | {each.metadata['about']} |")
    return "\n".join(rows)


def _shown(default: Any, names: Mapping[Any, str]) -> str:  # Any: each setting has its own type
    if default in ("", None):
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, frozenset):
        return f"`{','.join(sorted(default))}`"
    if isinstance(default, tuple):
        return f"`{','.join(map(str, default))}`"
    return f"`{names.get(default, default)}`"
