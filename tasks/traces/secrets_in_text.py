"""Find credentials in a text: keys of known shapes, Bearer tokens, key blocks, password-like fields.

    text -> take_secrets() -> text with [redacted:secret], how many were taken

Every pattern is linear in the text, whatever it holds: repeats are possessive or bounded, a pattern
starts with a literal, and a start that fails has looked at a bounded number of characters. So no
input can make it slow.

Ring: pure.  Source of the shapes: the vendors' own prefixes, which exist so that scanners find them.
"""

import re
from collections.abc import Callable
from functools import lru_cache

MARK = "[redacted:secret]"

# literal that the key starts with -> what follows; the literal must not follow a letter or digit
_SHAPES = {
    "sk-": r"[A-Za-z0-9_-]{16,}+",  # OpenAI, Anthropic, LiteLLM, Langfuse ...
    "pk-lf-": r"[A-Za-z0-9-]{16,}+",
    "sk_live_": r"[A-Za-z0-9]{12,}+",  # Stripe
    "sk_test_": r"[A-Za-z0-9]{12,}+",
    "rk_live_": r"[A-Za-z0-9]{12,}+",
    "hf_": r"[A-Za-z0-9]{20,}+",  # Hugging Face
    "AKIA": r"[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
    "ASIA": r"[A-Z0-9]{16}(?![A-Za-z0-9])",
    "ghp_": r"[A-Za-z0-9]{20,}+",  # GitHub
    "gho_": r"[A-Za-z0-9]{20,}+",
    "ghu_": r"[A-Za-z0-9]{20,}+",
    "ghs_": r"[A-Za-z0-9]{20,}+",
    "ghr_": r"[A-Za-z0-9]{20,}+",
    "github_pat_": r"[A-Za-z0-9_]{20,}+",
    "glpat-": r"[A-Za-z0-9_-]{16,}+",  # GitLab
    "xoxb-": r"[A-Za-z0-9-]{10,}+",  # Slack
    "xoxp-": r"[A-Za-z0-9-]{10,}+",
    "xoxa-": r"[A-Za-z0-9-]{10,}+",
    "xapp-": r"[A-Za-z0-9-]{10,}+",
    "AIza": r"[A-Za-z0-9_-]{35}",  # Google
    "ya29.": r"[A-Za-z0-9_-]{20,}+",
    "gsk_": r"[A-Za-z0-9]{20,}+",  # Groq
    "nvapi-": r"[A-Za-z0-9_-]{20,}+",
    "r8_": r"[A-Za-z0-9]{20,}+",  # Replicate
    "npm_": r"[A-Za-z0-9]{20,}+",
    "pypi-": r"[A-Za-z0-9_-]{20,}+",
    "wandb_v1_": r"[A-Za-z0-9_]{16,}+",
    "tatara-": r"[A-Za-z0-9_-]{32,}+",  # the gateway's own
}
_PATTERNS = [
    (literal, re.compile(f"{re.escape(literal)}(?<![A-Za-z0-9]{re.escape(literal)}){body}"))
    for literal, body in _SHAPES.items()
]
_PART = r"[A-Za-z0-9_-]"
_JWT = re.compile(rf"eyJ(?<![A-Za-z0-9]eyJ){_PART}{{5,400}}+\.{_PART}{{2,}}+\.{_PART}*+")
_BEARER = re.compile(r"((?i:bearer)(?:[ \t]{1,4}+|%20))([A-Za-z0-9._~+/=-]{8,}+)")
_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_IN_URL = re.compile(r"(://[^\s/:@\"'\[]{0,64}+:)([^\s/@\"'\[\]]{1,128}+)@")
_NAME = r"[A-Za-z0-9_.-]{1,64}+"
_GAP = r"[ \t\n]{0,8}+"
_QUOTED = re.compile(rf"""((["']){_NAME}\2{_GAP}:{_GAP}(["']))((?:(?!\3)[^\\\r\n]|\\.)++)""")
_ESCAPED = re.compile(rf"""(\\{{1,3}}+"{_NAME}\\{{1,3}}+"{_GAP}:{_GAP}\\{{1,3}}+")([^"\\\r\n]++)""")
_ASSIGNED = re.compile(rf"(?<![A-Za-z0-9_.-])({_NAME}(?:=|: ?)[\"']?)([A-Za-z0-9+/_~!@#$%^*-]{{6,}}+)(?![\w.(\[])")
_HEADER = re.compile(
    r"((?i:authorization)[\"']?\s{0,4}+[:=]\s{0,4}+[\"']?(?:(?i:basic|token|apikey)\s{1,4}+)?)([A-Za-z0-9._~+/=-]{8,}+)"
)
_JAPANESE = re.compile(r"((?:パスワード|暗証番号)[はを：:＝= 　]{1,3}+[「『\"']?)([!-~]{4,128}+)")
_NAME_ENDS = (
    *("password", "passwd", "passphrase", "secret", "apikey", "accesskey", "secretkey", "privatekey"),
    *("accesstoken", "refreshtoken", "idtoken", "authtoken", "apitoken", "bearertoken", "sessiontoken"),
    *("authorization", "credential", "credentials"),
)
_NAMES = frozenset({"pwd", "token", "cookie", "setcookie"})

_SHORTEST_KEY = 14
_LONG_RUN = re.compile(
    rf"[A-Za-z0-9_.-]{{{_SHORTEST_KEY},}}+"
)  # every key of a known shape is one, few other words are
_AROUND = _SHORTEST_KEY + max(map(len, _SHAPES))
_PLAIN = tuple((max(hint, key="zqjkxvw9KJSI".find), hint) for hint in (*_SHAPES, "eyJ") if hint[-1] not in "-_")
_MARKED = tuple(
    (mark, tuple(hint[:-1].rpartition(mark)[2] for hint in hints), hints)
    for mark in "-_"
    for hints in [tuple(hint for hint in _SHAPES if hint.endswith(mark))]
)
_NAME_HINTS = ("password", "passwd", "passphrase", "secret", "authorization", "credential", "cookie", "pwd", "key")


def may_hold_secrets(text: str) -> bool:
    """Say quickly whether `take_secrets` could find something. Cost: see docs/traces.md.

    >>> may_hold_secrets("What is a task? It is a job: a piece of work.")
    False
    """
    if len(text) >= _SHORTEST_KEY and _has_key_shape(text):
        return True
    if ":" in text or "=" in text:
        lower = text.lower()
        for hint in _NAME_HINTS:
            if hint in lower:
                return True
        if lower.count("token") > lower.count("tokens") or ("@" in text and "://" in text):
            return True
    if "earer" in text or ("R" in text and ("EARER" in text or "PRIVATE KEY" in text)):
        return True
    return not text.isascii() and ("パスワード" in text or "暗証番号" in text)


def _has_key_shape(text: str) -> bool:
    """Say whether a run that is long enough for a key holds what one starts with: `a task-based system` does not.

    Most texts hold few dashes, and one letter is looked for at a tenth of a word's cost.
    """
    for letter, hint in _PLAIN:
        if letter in text and hint in text and any(hint in run for run in _LONG_RUN.findall(text)):
            return True
    for mark, stems, hints in _MARKED:
        if mark not in text:
            continue
        at = -1  # of the mark
        for piece in text.split(mark)[:-1]:
            at += len(piece) + 1
            if piece.endswith(stems):
                begin, end = text.rfind(" ", max(0, at - _SHORTEST_KEY), at), text.find(" ", at, at + _SHORTEST_KEY)
                if begin >= 0 and 0 < end - begin <= _SHORTEST_KEY:
                    continue  # the word is too short
                around = text[max(0, at - _AROUND) : at + _SHORTEST_KEY]
                if any(hint in run for run in _LONG_RUN.findall(around) for hint in hints):
                    return True
    return False


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Say whether a field of this name holds a credential.

    >>> [is_secret_name(name) for name in ("dbPassword", "X-Api-Key", "access_token", "max_tokens", "eos_token")]
    [True, True, True, False, False]
    """
    plain = name.lower().replace("_", "").replace("-", "").replace(".", "")
    return plain in _NAMES or plain.endswith(_NAME_ENDS)


def take_secrets(text: str) -> tuple[str, int]:
    """Return the text with each credential replaced, and how many there were.

    >>> take_secrets("use hf_abcdefghijklmnopqrstuvwxyz now")
    ('use [redacted:secret] now', 1)
    """
    count = 0
    if "-----BEGIN " in text:
        text, count = _take_key_blocks(text)
    for literal, pattern in _PATTERNS:
        if literal in text:
            text, taken = pattern.subn(MARK, text)
            count += taken
    if "eyJ" in text:
        text, taken = _JWT.subn(MARK, text)
        count += taken
    for hint, pattern, replace in _NAMED:
        if hint in text:
            text, taken = _substitute(pattern, replace, text)
            count += taken
    return text, count


def _take_key_blocks(text: str) -> tuple[str, int]:
    """Replace private key blocks; one without its end goes on to the end of the text."""
    pieces: list[str] = []
    at = 0
    while begin := _BEGIN.search(text, at):
        end = _END.search(text, begin.end())
        pieces += [text[at : begin.start()], MARK]
        at = end.end() if end else len(text)
    return "".join([*pieces, text[at:]]), len(pieces) // 2


def _substitute(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str | None], text: str) -> tuple[str, int]:
    count = 0

    def one(match: re.Match[str]) -> str:
        nonlocal count
        new = replace(match)
        count += new is not None
        return match[0] if new is None else new

    return pattern.sub(one, text), count


def _is_likely(value: str) -> bool:
    """`Bearer abc123...`, but not `the bearer responsible`: a credential is long or holds a digit."""
    return len(value) >= 24 or any(letter.isdigit() for letter in value)


def _bearer(match: re.Match[str]) -> str | None:
    return f"{match[1]}{MARK}" if _is_likely(match[2]) else None


def _header(match: re.Match[str]) -> str | None:
    return f"{match[1]}{MARK}" if "basic" in match[1].lower() or _is_likely(match[2]) else None


def _quoted(match: re.Match[str]) -> str | None:
    """`"password": "..."` inside a text; group 1 ends before the value, the last one is the value."""
    name = match[1].partition(":")[0].strip("\\\"' \t\n")
    if not is_secret_name(name) or match[match.lastindex or 0].startswith("[redacted:"):
        return None
    return f"{match[1]}{MARK}"


def _assigned(match: re.Match[str]) -> str | None:
    """`API_KEY=abc123`, but no code like `token=next_token`: a value holds a digit."""
    if not is_secret_name(match[1].rstrip("=: \"'")) or not any(letter.isdigit() for letter in match[2]):
        return None
    return f"{match[1]}{MARK}"


_NAMED: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], str | None]], ...] = (
    ("earer", _BEARER, _bearer),
    ("EARER", _BEARER, _bearer),
    ("uthorization", _HEADER, _header),
    ("UTHORIZATION", _HEADER, _header),
    ("://", _IN_URL, lambda match: f"{match[1]}{MARK}@"),
    ('":', _QUOTED, _quoted),
    ("':", _QUOTED, _quoted),
    ('\\"', _ESCAPED, _quoted),
    ("=", _ASSIGNED, _assigned),
    (":", _ASSIGNED, _assigned),
    ("パスワード", _JAPANESE, lambda match: f"{match[1]}{MARK}"),
    ("暗証番号", _JAPANESE, lambda match: f"{match[1]}{MARK}"),
)
