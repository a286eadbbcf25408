"""Read rows one at a time: JSONL, CSV and parquet files, and a split of a Hub data set.

    file -> read_file() -> (where, row or the reason why it is none)
    Hub id at a commit -> read_hub() -> the same

Ring: edge (disk, Hub).
"""

import csv
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from tasks.errors import CorruptError, DataError, MissingError, SpecError, TataraError, TransientError
from tasks.hub import hub_errors

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
_BATCH_ROWS = 256
Row = dict[str, Any]  # Any: row values
Found = Generator[tuple[str, Row | str]]  # (where, the row or the reason why it is none)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRows:
    """Which rows of the Hub: a split of a data set at a commit. `knob` is what a person would check: FetchSpec.source.

    A stream reads only as far as its reader goes; else the split is downloaded whole, once. Of `columns` those that
    exist are read; none named, or none there: all.
    """

    repo_id: str
    config: str
    split: str
    commit: str
    is_stream: bool
    knob: str
    columns: tuple[str, ...] = ()
    check: Callable[[list[str]], None] = lambda names: None  # raises for columns that lack what is wanted

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"data set {self.repo_id}@{self.commit[:8]} split {self.split!r}"


def read_file(path: Path, columns: tuple[str, ...] = ()) -> Found:
    """Yield (where, row) of a JSONL, CSV or parquet file; `where` is the line (parquet: row) that a person looks up.

    Args:
        path: told apart by its ending; without one of ours it is read as JSONL.
        columns: of a parquet file only these are read, where they exist.
    Raises: CorruptError naming the file.
    """
    read = {".parquet": lambda path: _read_parquet(path, columns), ".csv": _read_csv}.get(path.suffix, _read_jsonl)
    try:
        yield from ((f"{path.name}:{number}", row) for number, row in read(path))
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 ({error}): convert it, or delete those bytes") from error
    except csv.Error as error:
        raise CorruptError(f"{path} is no CSV ({error}): mend it, or save it as JSONL") from error
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path} is no whole parquet file ({error}): download or make it again") from error


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Row | str]]:
    with pq.ParquetFile(path) as table:
        wanted = [name for name in columns if name in table.schema_arrow.names] or None
        rows = (row for batch in table.iter_batches(_BATCH_ROWS, columns=wanted) for row in batch.to_pylist())
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


def read_hub(wanted: HubRows, hub: HfApi) -> Found:
    """Yield (where, row) of a split of a Hub data set, exactly at its commit.

    Raises: MissingError, DataError (unknown split or configuration), AccessError, TransientError.
    """
    from datasets import config
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetNotFoundError, FileNotFoundDatasetsError

    if config.HF_ENDPOINT.rstrip("/") != hub.endpoint:  # datasets reads it at import: the token would go elsewhere
        raise SpecError(f"{wanted.name}: the Hub Account's endpoint is {hub.endpoint}; set HF_ENDPOINT to it as well")
    with hub_errors(wanted.name):
        try:
            rows = _open_hub(wanted, hub)
            yield from ((f"{wanted.split}:{index}", dict(row)) for index, row in enumerate(rows))
        except DatasetNotFoundError as error:
            raise MissingError(f"{wanted.name}: not found; check {wanted.knob} and HF_TOKEN") from error
        except (FileNotFoundDatasetsError, EmptyDatasetError) as error:
            raise DataError(f"{wanted.name} has no data that can be read: {error}") from error
        except FileNotFoundError as error:  # its commit was there a moment ago; datasets drops the Hub's own answer
            raise error if isinstance(error, TataraError) else TransientError(f"{wanted.name}: {error}") from error
        except ValueError as error:  # an unknown split or configuration; the message lists what exists
            raise error if isinstance(error, TataraError) else DataError(f"{wanted.name}: {error}") from error


def _open_hub(wanted: HubRows, hub: HfApi) -> Any:  # Any: datasets' iterables
    """Return the rows of a split: downloaded whole, or as a stream when only the first are wanted."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(wanted.repo_id, wanted.config or None, revision=wanted.commit, token=hub.token)
    if builder.hash != wanted.commit:  # when the Hub fails, datasets falls back to whatever revision it has cached
        raise TransientError(f"{wanted.name}: the Hub failed, and the cache holds {builder.hash} instead")
    if builder.info.features:  # what its card or its files tell before a row is downloaded
        wanted.check(list(builder.info.features))
    if not wanted.is_stream:
        builder.download_and_prepare()
    rows: Any = (builder.as_streaming_dataset if wanted.is_stream else builder.as_dataset)(split=wanted.split)
    columns = [name for name in wanted.columns if name in (rows.column_names or [])]
    return rows.select_columns(columns) if columns else rows
