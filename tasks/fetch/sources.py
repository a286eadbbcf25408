"""Read a source row by row: the shipped data, local files, a split of a Hub data set.

    FetchSpec -> pin_dataset() -> what its names mean now -> read_rows() -> one Read at a time

Ring: edge (disk, Hub).
"""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from tasks import files
from tasks.errors import CorruptError, DataError, MissingError, SpecError, TataraError, TransientError
from tasks.fetch.rows import Read, RejectedRowError, Row, is_validation_row, read_row, require_columns
from tasks.hub import hub_errors, pin_commit
from tasks.specs import FetchSpec

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "ja_culture"
_SUFFIXES = (".jsonl", ".csv", ".parquet")
_OTHER_SUFFIXES = (".json", ".ndjson", ".tsv", ".txt", ".xlsx", ".arrow", ".gz", ".zst", ".zip")
Found = Iterator[tuple[str, Row | str]]  # (where, the row or the reason why it is none)


def pin_dataset(spec: FetchSpec, hub: HfApi) -> dict[str, str]:
    """Return what the source's name means right now: digests of files, or the commit of a Hub data set.

    Raises: MissingError (no such file, repo, revision), SpecError (not a name of either), AccessError.
    """
    is_hub = spec.source != "shipped" and not _is_file_name(spec.source)
    if spec.validation_source and (is_hub or spec.source == "shipped"):
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
        sources = [_read_hub(spec, name, pins["commit"], hub) for name in names]
    else:
        sources = [_read_file(path) for path in _paths(spec).values()]
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


def _is_file_name(source: str) -> bool:
    """A Hub id is `name` or `owner/name`; whatever has a file's ending, or a path's beginning, is no such id."""
    looks_like_one = source.startswith((".", "/", "~")) or source.endswith((*_SUFFIXES, *_OTHER_SUFFIXES))
    return looks_like_one or Path(source).expanduser().exists()


def _paths(spec: FetchSpec) -> dict[str, Path]:
    if spec.source == "shipped":
        return {"source": SHIPPED / "train.jsonl", "validation_source": SHIPPED / "validation.jsonl"}
    named = {"source": spec.source, "validation_source": spec.validation_source}
    return {name: Path(path).expanduser() for name, path in named.items() if path}


def _fault(name: str, path: Path) -> TataraError | None:
    if path.is_dir():
        held = ", ".join(sorted(each.name for each in path.iterdir() if each.suffix in _SUFFIXES)[:5]) or "none"
        return SpecError(
            f"FetchSpec.{name} = {path} is a folder, expected one {', '.join(_SUFFIXES)} file (it holds: {held})"
        )
    if path.suffix in _OTHER_SUFFIXES:
        return SpecError(
            f"FetchSpec.{name} = {path}: {path.suffix} files are not read, expected one of {', '.join(_SUFFIXES)}: "
            "save it as JSONL, one row in a line"
        )
    if not path.is_file():
        return MissingError(f"data file {path} is not there (working directory {Path.cwd()}): check FetchSpec.{name}")
    return None


def _read_file(path: Path) -> Found:
    """Yield (where, row) of a JSONL, CSV or parquet file; `where` is the line (parquet: row) that a person looks up."""
    read = {".parquet": _read_parquet, ".csv": _read_csv}.get(path.suffix, _read_jsonl)
    try:
        yield from ((f"{path.name}:{number}", row) for number, row in read(path))
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 ({error}): convert it, or delete those bytes") from error
    except csv.Error as error:
        raise CorruptError(f"{path} is no CSV ({error}): mend it, or save it as JSONL") from error
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path} is no whole parquet file ({error}): download or make it again") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row | str]]:
    rows = (row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    yield from enumerate(rows, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Row | str]]:
    """A row of another length than the header is no row: an unquoted comma would cut an answer short in silence."""
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle)
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise CorruptError(f"{path}: its header names {twice[0]!r} twice: rename one")
        for fields in reader:
            where = reader.line_num  # the last line of the row: a quoted field may hold line ends
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif fields:
                yield where, f"it has {len(fields)} fields but the header names {len(header)}: quote those with commas"


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorruptError(f"{path}:{number} is not JSON ({error.msg}): mend or delete that line") from error
            yield number, row if isinstance(row, dict) else {"value": row}


def _read_hub(spec: FetchSpec, split: str, commit: str, hub: HfApi) -> Found:
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError

    doing = f"data set {spec.source}@{commit[:8]} split {split!r}"
    if config.HF_ENDPOINT.rstrip("/") != hub.endpoint:  # datasets reads it at import: the token would go elsewhere
        raise SpecError(f"{doing}: the Hub Account's endpoint is {hub.endpoint}; set HF_ENDPOINT to it as well")
    with hub_errors(doing):
        try:
            rows = _open_hub(spec, split, commit, hub, doing)
            yield from ((f"{split}:{index}", dict(row)) for index, row in enumerate(rows))
        except DatasetNotFoundError as error:
            raise MissingError(f"{doing}: not found; check FetchSpec.source and HF_TOKEN") from error
        except ValueError as error:  # an unknown split or configuration; the message lists what exists
            raise error if isinstance(error, TataraError) else DataError(f"{doing}: {error}") from error


def _open_hub(spec: FetchSpec, split: str, commit: str, hub: HfApi, doing: str) -> Any:  # Any: datasets' iterables
    """Return the rows of a split: downloaded whole, or as a stream when only the first are wanted."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(spec.source, spec.config or None, revision=commit, token=hub.token)
    if builder.hash != commit:  # when the Hub fails, datasets falls back to whatever revision it has cached
        raise TransientError(f"{doing}: the Hub failed, and the cache holds {builder.hash} instead")
    if builder.info.features:  # what its card or its files tell before a row is downloaded
        require_columns(list(builder.info.features), spec, doing)
    if spec.max_rows:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
