"""Read a source row by row: the shipped data, local files, a split of a Hub data set.

    FetchSpec -> pin_dataset() -> what its names mean now -> read_rows() -> one Read at a time

Ring: edge (disk, Hub).
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.errors import MissingError, SpecError, TataraError, TransientError
from tasks.fetch.rows import Read, RejectedRowError, Row, is_validation_row, read_row, require_columns
from tasks.hub import pin_commit
from tasks.specs import FetchSpec
from tasks.tables import TABLE_SUFFIXES, HubRows, read_file, read_hub

_DATA = Path(__file__).resolve().parents[2] / "data"
SHIPPED = _DATA / "ja_culture"
_SHIPPED_SETS = {
    "shipped": {"source": SHIPPED / "train.jsonl", "validation_source": SHIPPED / "validation.jsonl"},
    "shipped:ja_arithmetic": {"source": _DATA / "ja_arithmetic" / "ja_arithmetic_q_dataset.csv"},
}
_OTHER_SUFFIXES = (".json", ".ndjson", ".tsv", ".txt", ".xlsx", ".arrow", ".gz", ".zst", ".zip")


def pin_dataset(spec: FetchSpec, hub: HfApi) -> dict[str, str]:
    """Return what the source's name means right now: digests of files, or the commit of a Hub data set.

    Raises: MissingError (no such file, repo, revision), SpecError (not a name of either), AccessError.
    """
    is_hub = spec.source not in _SHIPPED_SETS and not _is_file_name(spec.source)
    if spec.validation_source and (is_hub or spec.source in _SHIPPED_SETS):
        raise SpecError(
            f"FetchSpec.validation_source = {spec.validation_source} goes with a file, but FetchSpec.source = "
            f"{spec.source}: use validation_split for a Hub data set, or name files for both"
        )
    if is_hub:
        return {"commit": pin_commit(hub, spec.source, spec.revision, "dataset")}
    paths = _paths(spec)
    faults = [fault for name, path in paths.items() if (fault := _fault(name, path))]
    if len(faults) > 1:
        raise SpecError(" | ".join(str(fault) for fault in faults))
    if faults:
        raise faults[0]
    return {name: files.digest(path) for name, path in paths.items()}


def require_unchanged(spec: FetchSpec, hub: HfApi, pins: dict[str, str]) -> None:
    """Raise TransientError when a file was edited while it was read: its rows would lie under the old digest."""
    changed = [] if "commit" in pins else [name for name, now in pin_dataset(spec, hub).items() if now != pins[name]]
    if changed:
        raise TransientError(f"{_paths(spec)[changed[0]]} changed while it was read: it is read again")


def read_rows(spec: FetchSpec, hub: HfApi, pins: dict[str, str]) -> Iterator[Read]:
    """Yield every row of the source, usable or not, with the split that it falls on; one is in memory at a time."""
    if "commit" in pins:
        names = [spec.split, *([spec.validation_split] if spec.validation_split else [])]
        sources = [read_hub(_hub_rows(spec, name, pins["commit"]), hub) for name in names]
    else:
        sources = [read_file(path) for path in _paths(spec).values()]
    for split, source in zip(("train", "validation"), sources, strict=False):
        for where, found in islice(source, spec.max_rows or None):
            yield _read(split, where, found, spec, is_split=len(sources) == 2)


def _read(split: str, where: str, found: Row | str, spec: FetchSpec, *, is_split: bool) -> Read:
    try:
        if isinstance(found, str):
            raise RejectedRowError(found)
        row = read_row(found, spec)
    except RejectedRowError as error:
        return Read(split=split, row_id=where, reason=str(error))
    if not is_split and is_validation_row(row, spec.validation_pct):
        split = "validation"
    return Read(split=split, row_id=where, row=row)


def _hub_rows(spec: FetchSpec, split: str, commit: str) -> HubRows:
    name = f"data set {spec.source}@{commit[:8]} split {split!r}"
    return HubRows(
        repo_id=spec.source,
        config=spec.config,
        split=split,
        commit=commit,
        is_stream=spec.max_rows > 0,
        knob="FetchSpec.source",
        check=lambda columns: require_columns(columns, spec, name),
    )


def _is_file_name(source: str) -> bool:
    """A Hub id is `name` or `owner/name`; whatever has a file's ending, or a path's beginning, is no such id."""
    looks_like_one = source.startswith((".", "/", "~")) or source.endswith((*TABLE_SUFFIXES, *_OTHER_SUFFIXES))
    return looks_like_one or Path(source).expanduser().exists()


def _paths(spec: FetchSpec) -> dict[str, Path]:
    if spec.source in _SHIPPED_SETS:
        return dict(_SHIPPED_SETS[spec.source])
    named = {"source": spec.source, "validation_source": spec.validation_source}
    return {name: Path(path).expanduser() for name, path in named.items() if path}


def _fault(name: str, path: Path) -> TataraError | None:
    if path.is_dir():
        held = ", ".join(sorted(each.name for each in path.iterdir() if each.suffix in TABLE_SUFFIXES)[:5]) or "none"
        return SpecError(
            f"FetchSpec.{name} = {path} is a folder, expected one {', '.join(TABLE_SUFFIXES)} file (it holds: {held})"
        )
    if path.suffix in _OTHER_SUFFIXES:
        return SpecError(
            f"FetchSpec.{name} = {path}: {path.suffix} files are not read, expected one of "
            f"{', '.join(TABLE_SUFFIXES)}: save it as JSONL, one row in a line"
        )
    if not path.is_file():
        return MissingError(f"data file {path} is not there (working directory {Path.cwd()}): check FetchSpec.{name}")
    return None
