"""Take secrets and personal data out of a trace before it touches the disk.

    a record's fields -> Redactor.redact() -> the same shape, texts with [redacted:email] ..., counts by kind

Kinds: secrets, email, phone, card, ip, my_number, and custom (one's own patterns). Keys of objects
are looked at like texts, and a text that is JSON itself (the arguments of a tool call) is read, so
that a password with a quote in it is found too. When something was taken out of a record, its
token-wise copies of the same text (logprobs, token ids) go as well: they would spell it out again.

Not seen: numbers that are JSON numbers, texts inside base64 data, token ids in a prompt, and what
one message splits over two.

Ring: pure.  Cost: see docs/traces.md; a record that holds no hint of a secret is only skimmed.
Trap: all patterns of ours are linear in the text; one's own are refused when a repeat is nested
inside a repeat, but a slow one is still possible.
"""

import json
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from tasks.errors import SpecError
from tasks.traces.numbers_in_text import take_numbers
from tasks.traces.record import Json
from tasks.traces.secrets_in_text import MARK, is_secret_name, may_hold_secrets, take_secrets

KINDS = ("secrets", "email", "phone", "card", "ip", "my_number")
_NUMBERS = frozenset({"phone", "card", "my_number"})
_MARKS = re.compile(r"(\[redacted:[a-z_]{1,20}\])")
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]++@[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]++)++")
_IP4 = re.compile(r"(?<![A-Za-z0-9_.])(?:[0-9]{1,3}+\.){3}[0-9]{1,3}+(?![A-Za-z0-9_]|\.[0-9])")
_IP6 = re.compile(r"(?<![A-Za-z0-9_:.])[0-9A-Fa-f:.]{3,45}+(?![A-Za-z0-9_:])")
_TOKENWISE = frozenset({"logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids"})
_DIGITS = re.compile(r"[0-9０-９](?:[^0-9０-９]{0,3}+[0-9０-９]){8}")  # the shortest number has nine
_SHORTEST = 6  # text or name of a field
_MAX_ROUNDS = 4  # a replacement may uncover another match; each round costs one pass
_MAX_DEPTH = 200
_SHORT, _MAX_NAMES = 24, 4096  # texts and names that are remembered
_LONGEST_GROUP = 4  # of an IPv6 address
_HEX = "0123456789abcdefABCDEF"
_May = Callable[[str], bool]
_Take = Callable[[str, dict[str, int]], str]


class _Deep(Exception):  # noqa: N818 - never leaves this module
    """The value nests deeper than a person or a model writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redactor:
    """What to take out. Safe to share between threads: all that it remembers is which names are harmless."""

    kinds: Set[str] = frozenset({"secrets"})
    patterns: tuple[re.Pattern[str], ...] = ()
    _takers: tuple[tuple[_May, _Take], ...] = field(init=False, repr=False)
    _plain_names: set[str] = field(init=False, repr=False, default_factory=set)  # fields that are never taken out
    _is_short_suspect: _May = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_takers", tuple(_takers_of(self.kinds, self.patterns)))
        object.__setattr__(self, "_is_short_suspect", lru_cache(4096)(self._is_suspect))  # "assistant", "mock", ...

    def redact(self, record: Json) -> Json:
        """Return the record without what is to be taken out; the same object when there is nothing.

        Looked at are `request`, `response` and `error`; what was found is counted in `redactions`.
        """
        if not self._takers or not self._may_match([[record["request"], record["response"], record["error"]]]):
            return record
        counts: dict[str, int] = {}
        try:
            request = self._walk(record["request"], counts, 0)
            response = self._walk(record["response"], counts, 0)
        except _Deep:  # unreadable for us: metadata is all that may leave
            return record | {"request": None, "response": None, "redactions": {"too_deep": 1}}
        error = self.text(record["error"], counts) if record["error"] else record["error"]
        if not counts:
            return record
        request, response = _without_tokens(request, counts), _without_tokens(response, counts)
        merged = {**(record["redactions"] or {}), **counts}
        return record | {"request": request, "response": response, "error": error, "redactions": merged}

    def text(self, text: str, counts: dict[str, int]) -> str:
        """Return the text with what is to be taken out replaced; adds to `counts`. Idempotent."""
        for _ in range(_MAX_ROUNDS):
            before = text
            for _, take in self._takers:
                text = _between_marks(text, take, counts)
            if text is before or text == before:
                break
        return text

    def _may_match(self, todo: list[Any]) -> bool:  # Any: JSON values
        """Skim these objects and lists: most hold nothing that looks like it, and are done with this."""
        plain_names, is_short_suspect, is_suspect = self._plain_names, self._is_short_suspect, self._is_suspect
        while todo:
            value = todo.pop()
            if type(value) is dict:
                if not plain_names.issuperset(value) and self._is_name_suspect(value):
                    return True
                value = value.values()
            for item in value:
                kind = type(item)
                if kind is str:
                    size = len(item)
                    if size >= _SHORTEST and (is_short_suspect if size <= _SHORT else is_suspect)(item):
                        return True
                elif kind is dict or kind is list:
                    todo.append(item)
        return False

    def _is_name_suspect(self, value: Json) -> bool:
        """Say whether a name, or a secret in a field of that name, is to be taken out; remember plain names."""
        for name, item in value.items():
            is_secret = "secrets" in self.kinds and is_secret_name(name)
            if is_secret and _is_secret_field(name, item, value):
                return True
            if len(name) >= _SHORTEST and self._is_suspect(name):
                return True
            if not is_secret and len(self._plain_names) < _MAX_NAMES:
                self._plain_names.add(name)
        return False

    def _is_suspect(self, text: str) -> bool:
        """Say quickly whether something of these kinds could be in the text."""
        for may, _ in self._takers:  # noqa: SIM110 - a generator costs more than what it runs
            if may(text):
                return True
        return False

    def _walk(self, value: Any, counts: dict[str, int], depth: int) -> Any:  # Any: walks a JSON value
        if depth > _MAX_DEPTH:
            raise _Deep
        if isinstance(value, str):
            return self._string(value, counts, depth)
        if isinstance(value, list):
            return [self._walk(item, counts, depth + 1) for item in value]
        if isinstance(value, dict):
            return self._object(value, counts, depth)
        return value

    def _object(self, value: Json, counts: dict[str, int], depth: int) -> Json:
        made: Json = {}
        for name, item in value.items():
            if "secrets" in self.kinds and _is_secret_field(name, item, value):
                if item != MARK:
                    counts["secrets"] = counts.get("secrets", 0) + 1
                item = MARK
            else:
                item = self._walk(item, counts, depth + 1)
            key = self.text(name, counts) if len(name) >= _SHORTEST and self._is_suspect(name) else name
            while key in made:  # two names that are the same now
                key += "'"
            made[key] = item
        return made

    def _string(self, text: str, counts: dict[str, int], depth: int) -> str:
        if len(text) < _SHORTEST or (text.startswith("data:") and ";base64," in text[:100]):  # an image is no text
            return text
        if not self._is_suspect(text):
            return text
        if text[0] in "{[" and text[-1] in "}]" and "secrets" in self.kinds:
            try:
                inner = json.loads(text)
            except (ValueError, RecursionError):
                return self.text(text, counts)
            before = sum(counts.values())
            walked = self._walk(inner, counts, depth + 1)
            return json.dumps(walked, ensure_ascii=False) if sum(counts.values()) > before else text
        return self.text(text, counts)


def _takers_of(kinds: Set[str], patterns: Iterable[re.Pattern[str]]) -> Iterable[tuple[_May, _Take]]:
    """Give per kind a quick look, which never misses anything, and what takes it out."""
    if "secrets" in kinds:
        yield may_hold_secrets, _secrets
    if "email" in kinds:
        yield (lambda text: "@" in text), _email
    if "ip" in kinds:
        yield _may_hold_ip, _ip
    if numbers := kinds & _NUMBERS:
        yield _may_hold_numbers, lambda text, counts: _numbers(text, counts, numbers)
    for pattern in patterns:
        yield (
            lambda text, pattern=pattern: pattern.search(text) is not None,
            lambda text, counts, pattern=pattern: _counted(pattern, "custom", text, counts),
        )


def _may_hold_ip(text: str) -> bool:
    """IPv4 has two groups of digits between dots, IPv6 a group of hexadecimal digits, or nothing, between colons."""
    if text.count(".") >= 3:
        for piece in text.split(".")[1:-1]:
            if len(piece) <= 3 and piece.isdecimal():
                return True
    if text.count(":") >= 2:
        for piece in text.split(":")[1:-1]:
            if len(piece) <= _LONGEST_GROUP and not piece.strip(_HEX):
                return True
    return False


def _may_hold_numbers(text: str) -> bool:
    if text.isascii():
        data = text.encode()
        if len(data) - len(data.translate(None, b"0123456789")) < 9:
            return False
    return _DIGITS.search(text) is not None


def read_patterns(text: str, name: str) -> tuple[re.Pattern[str], ...]:
    """Read one's own patterns: one regular expression per line; empty lines and `# ...` are left out.

    Raises SpecError naming the line of a pattern that is none, matches the empty text, or nests repeats.
    """
    found: list[re.Pattern[str]] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        try:
            pattern = re.compile(line)
        except re.error as error:
            raise SpecError(f"{name}:{number} is no regular expression ({error}): correct or remove it") from None
        if pattern.search(""):
            raise SpecError(f"{name}:{number} matches the empty text, it would mark everything: make it longer")
        if _NESTED.search(line):
            raise SpecError(
                f"{name}:{number} repeats a repeat, like (a+)+: some text would take it for ever; "
                "bound the outer one, or make the inner one possessive (a++)"
            )
        found.append(pattern)
    return tuple(found)


_NESTED = re.compile(r"(?:[+*]|,\})(?!\+)\??[^()]*\)(?:[*+]|\{\d*,\})(?!\+)")


def _is_secret_field(name: str, item: Any, around: Json) -> bool:  # Any: a JSON value
    if isinstance(item, bool) or not isinstance(item, (str, int, float)) or item == "" or not is_secret_name(name):
        return False
    return not (name == "token" and "logprob" in around)  # logprobs: a token is a piece of the answer


def _between_marks(text: str, take: Callable[[str, dict[str, int]], str], counts: dict[str, int]) -> str:
    if "[redacted:" not in text:
        return take(text, counts)
    parts = _MARKS.split(text)
    return "".join(part if index % 2 else take(part, counts) for index, part in enumerate(parts))


def _secrets(text: str, counts: dict[str, int]) -> str:
    text, taken = take_secrets(text)
    if taken:
        counts["secrets"] = counts.get("secrets", 0) + taken
    return text


def _email(text: str, counts: dict[str, int]) -> str:
    return _counted(_EMAIL, "email", text, counts) if "@" in text else text


def _counted(pattern: re.Pattern[str], kind: str, text: str, counts: dict[str, int]) -> str:
    text, taken = pattern.subn(f"[redacted:{kind}]", text)
    if taken:
        counts[kind] = counts.get(kind, 0) + taken
    return text


def _numbers(text: str, counts: dict[str, int], kinds: Set[str]) -> str:
    if not _may_hold_numbers(text):
        return text
    text, taken = take_numbers(text, kinds)
    for kind, count in taken.items():
        counts[kind] = counts.get(kind, 0) + count
    return text


def _ip(text: str, counts: dict[str, int]) -> str:
    if not _may_hold_ip(text):
        return text

    def one(match: re.Match[str]) -> str:
        found = match[0].rstrip(".")
        rest = match[0][len(found) :]
        if ":" in found and (found.count(":") < 2 or not any(letter.isdigit() for letter in found)):
            return match[0]
        try:
            ip_address(found)
        except ValueError:
            return match[0]
        counts["ip"] = counts.get("ip", 0) + 1
        return f"[redacted:ip]{rest}"

    text = _IP4.sub(one, text) if text.count(".") >= 3 else text
    return _IP6.sub(one, text) if text.count(":") >= 2 else text


def _without_tokens(value: Any, counts: dict[str, int]) -> Any:  # Any: walks a JSON value
    if isinstance(value, list):
        return [_without_tokens(item, counts) for item in value]
    if not isinstance(value, dict):
        return value
    made: Json = {}
    for name, item in value.items():
        if name in _TOKENWISE and isinstance(item, (dict, list)):
            counts["tokenwise"] = counts.get("tokenwise", 0) + 1
            item = None
        made[name] = _without_tokens(item, counts)
    return made
