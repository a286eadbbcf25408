"""The gateway's API keys: who may ask, hashed at rest.

    python -m deployments.gateway.keys add NAME [--requests-per-minute N] [--tokens-per-day N] [--models A,B]
    python -m deployments.gateway.keys list | remove NAME | disable NAME | enable NAME
    GATEWAY_KEYS_FILE -> KeyRing.find(token) -> Key

The file has one JSON object per line. It holds the SHA-256 of each key and never the key, which is shown
once, when it is made. No salt and no slow hash: those protect secrets that people choose. A key here is 256
random bits; no table of guesses reaches it, and what can't be guessed need not be guessed slowly. A running
gateway notices a changed file within a second; a file that turned bad changes nothing and is logged.

Ring: edge (disk).
"""

import argparse
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tasks import files
from tasks.errors import MissingError, SpecError, TataraError

PREFIX = "tatara-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key; 0 is no limit, no models are all models."""

    name: str
    sha256: str
    requests_per_minute: int = 0
    tokens_per_day: int = 0
    models: tuple[str, ...] = ()
    disabled: bool = False


def make_key(name: str, *, requests_per_minute: int = 0, tokens_per_day: int = 0, models: str = "") -> tuple[Key, str]:
    """Return a new key and its token, which is kept nowhere. Raises SpecError for a bad name or number."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"key name {name!r}: expected 1..64 letters, digits, or . _ @ -, a letter or digit first")
    token = PREFIX + secrets.token_urlsafe(32)
    named = tuple(filter(None, models.split(",")))
    key = Key(
        name=name,
        sha256=digest_of(token.encode()),
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
        models=named,
    )
    return _checked(key), token


def digest_of(token: bytes) -> str:
    """Return what the file keeps of a token."""
    return hashlib.sha256(token).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Read the file. Raises MissingError or SpecError naming the line."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise MissingError(
            f"GATEWAY_KEYS_FILE={str(path)!r} does not exist: make a key with "
            f"`python -m deployments.gateway.keys --file {path} add NAME`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"GATEWAY_KEYS_FILE={str(path)!r} can't be read ({error})") from error
    keys = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"{path} names {', '.join(sorted(twice))} twice: remove one of the lines")
    return keys


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write the file whole; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0o077)
    try:
        files.write_text(path, "".join(json.dumps(asdict(key)) + "\n" for key in keys))
    finally:
        os.umask(mask)


def _parse(path: Path, number: int, line: str) -> Key:
    known = {field.name for field in fields(Key)}
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}, expected an object")
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; expected of {', '.join(sorted(known))}")
        value["models"] = tuple(value.get("models", ()))
        return _checked(Key(**value))
    except (TypeError, ValueError) as error:
        raise SpecError(f"{path} line {number} is no key: {error}") from None


def _checked(key: Key) -> Key:
    for name in ("requests_per_minute", "tokens_per_day"):
        if not isinstance(getattr(key, name), int) or getattr(key, name) < 0:
            raise SpecError(f"{name}={getattr(key, name)!r}: expected a whole number; 0 is no limit")
    if not isinstance(key.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
        raise SpecError(f"the sha256 of key {key.name!r} is no SHA-256: make a new key")
    return key


class KeyRing:
    """The keys of a running gateway."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self._keys = {key.sha256: key for key in read_keys(path)}

    def find(self, token: bytes) -> Key | None:
        """Return the key of a token.

        The table is searched by the token's hash, which nobody can steer byte by byte, and what is found is
        compared in constant time.
        """
        digest = digest_of(token)
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def reload(self) -> None:
        """Read the file again when it changed; keep the old keys when it can't be read."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = {key.sha256: key for key in read_keys(self.path)}
            logger.info("read %d keys from %s", len(self._keys), self.path)
        except TataraError as error:
            logger.error("keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _change(path: Path, options: argparse.Namespace) -> str:
    """Do what the command line says; return what to print."""
    keys = read_keys(path) if path.exists() or options.command != "add" else []
    if options.command == "list":
        return "".join(
            f"{key.name}\t{key.requests_per_minute or 'unlimited'} requests/min\t"
            f"{key.tokens_per_day or 'unlimited'} tokens/day\t{','.join(key.models) or 'all models'}"
            f"{chr(9) + 'disabled' if key.disabled else ''}\n"
            for key in keys
        )
    known = {key.name: key for key in keys}
    name = options.name
    if options.command == "add":
        if name in known:
            raise SpecError(f"there is a key {name!r} already: remove it first, or choose another name")
        limits = {"requests_per_minute": options.requests_per_minute, "tokens_per_day": options.tokens_per_day}
        key, token = make_key(name, models=options.models, **limits)
        write_keys(path, [*keys, key])
        return f"{token}\n"
    if name not in known:
        raise SpecError(f"there is no key {name!r} in {path}: it has {', '.join(known) or 'none'}")
    if options.command == "remove":
        write_keys(path, [key for key in keys if key.name != name])
        return f"removed {name}\n"
    known[name] = replace(known[name], disabled=options.command == "disable")
    write_keys(path, list(known.values()))
    return f"{options.command}d {name}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Add, list, remove, disable or enable keys; the token goes to standard output, once."""
    parser = argparse.ArgumentParser(prog="python -m deployments.gateway.keys", description="Keys of the gateway.")
    parser.add_argument("--file", default=os.environ.get("GATEWAY_KEYS_FILE"), help="default: GATEWAY_KEYS_FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and print it, once")
    add.add_argument("--requests-per-minute", type=int, default=0, metavar="N")
    add.add_argument("--tokens-per-day", type=int, default=0, metavar="N")
    add.add_argument("--models", default="", metavar="A,B", help="only these models")
    commands.add_parser("list", help="show names and budgets")
    others = [commands.add_parser(name) for name in ("remove", "disable", "enable")]
    for command in (add, *others):
        command.add_argument("name", metavar="NAME")
    options = parser.parse_args(argv)
    if not options.file:
        parser.error("set GATEWAY_KEYS_FILE or give --file")
    path = Path(options.file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock_file(path.with_name(f"{path.name}.lock")):
            sys.stdout.write(_change(path, options))
    except (TataraError, OSError) as error:
        sys.stderr.write(f"keys: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
