"""metrics.csv and generations.csv: appended to while the run goes on, whole up to its last checkpoint after any crash.

    CsvStream(path, columns).append([{...}])    one write and one fsync for all rows of a step
    CsvStream.cut(step)                         at a resume: what a kill tore, and steps that will be done again, go

Ring: edge (disk). Imports no torch.
"""

import csv
import io
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tasks import files

Row = Mapping[str, Any]  # Any: numbers and texts
_ANY_LENGTH = 2**31 - 1
_COMPARED_BYTES = 4096


class CsvStream:
    """One CSV file whose first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        assert self.columns[0] == "step"

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, durable when this returns. A column that a row lacks, or None, is left empty."""
        with self.path.open("ab") as handle:
            handle.write(_encode([[row.get(name) for name in self.columns] for row in rows]))
            handle.flush()
            os.fsync(handle.fileno())

    def cut(self, step: int) -> None:
        """Keep the rows up to `step` and begin a file that is not there, or has other columns, with its header."""
        kept = [row for row in read_rows(self.path) if int(row["step"]) <= step]
        if kept and tuple(kept[0]) != self.columns:
            kept = []
        rows = [list(self.columns), *([row[name] for name in self.columns] for row in kept)]
        files.write_bytes(self.path, _encode(rows))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a stream as texts; a torn last one is left out, also when its quote was never closed."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return parse_rows(data[: data.rfind(b"\n") + 1])[0]


class NewRows:
    """What was appended to a stream since the last look, and the newest rows of all: a long run's file is read once.

    `is_anew` says whether the last look began at the file's start: at first, and after a resume has cut the file.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path, self.newest = path, deque[dict[str, str]](maxlen=keep)
        self.is_anew = True
        self._file, self._offset, self._before, self._columns = (0, 0), 0, b"", ()

    def read(self) -> list[dict[str, str]]:
        """Return the whole rows that are new; all of them after a resume has cut the file."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as handle:
            self.is_anew = not self._goes_on(handle)
            if self.is_anew:
                self._offset, self._before, self._columns = 0, b"", ()
                self.newest.clear()
            handle.seek(self._offset)
            data = handle.read()
        rows, taken = parse_rows(data, self._columns)
        if rows:  # a header alone is read again
            self._offset, self._columns = self._offset + taken, tuple(rows[0])
            self._before = data[:taken][-_COMPARED_BYTES:]
        self.newest.extend(rows)
        return rows

    def _goes_on(self, handle: BinaryIO) -> bool:
        """Say whether this is the file of the last look, with the same bytes where that ended.

        Its size says little: a resumed run may have written more than it cut. Nor does its number alone: that of a
        file which is gone is given again, and a page may be looked at hours apart.
        """
        stat = os.fstat(handle.fileno())
        before, self._file = self._file, (stat.st_dev, stat.st_ino)
        handle.seek(self._offset - len(self._before))
        return before == self._file and handle.read(len(self._before)) == self._before


def parse_rows(data: bytes, columns: Sequence[str] = ()) -> tuple[list[dict[str, str]], int]:
    r"""Return the whole rows of a piece of a stream and how many bytes they took; `columns` when it has no header.

    >>> parse_rows(b'step,text\r\n1,"a\nb"\r\n2,"torn\n')
    ([{'step': '1', 'text': 'a\nb'}], 20)
    """
    rows: list[dict[str, str]] = []
    names, taken, quotes, start = list(columns), 0, 0, 0
    for line in data.splitlines(keepends=True):
        taken, quotes = taken + len(line), quotes + line.count(b'"')
        if quotes % 2 or not line.endswith(b"\n"):
            continue  # inside a quoted text, or torn
        fields = _fields(data[start:taken].decode(errors="replace"))
        start = taken
        if not names:
            names = fields if "step" in fields else []
        elif len(fields) == len(names) and fields[names.index("step")].isdecimal():
            rows.append(dict(zip(names, fields, strict=True)))
    return rows, start


def _fields(record: str) -> list[str]:
    """Return the fields of one record, of any length; none of what is no single record.

    Other readers of this process keep their limit.
    """
    limit = csv.field_size_limit(_ANY_LENGTH)
    try:
        records = list(csv.reader(io.StringIO(record, newline="")))
    finally:
        csv.field_size_limit(limit)
    return records[0] if len(records) == 1 else []


def _encode(rows: Sequence[Sequence[Any]]) -> bytes:  # Any: numbers and texts
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["" if value is None else _plain(value) for value in row] for row in rows])
    return text.getvalue().encode(errors="replace")


def _plain(value: Any) -> Any:  # Any: numbers and texts
    if not isinstance(value, float):
        return value
    return f"{value:.3f}" if abs(value) >= 1e8 else f"{value:.8g}"  # a time keeps its milliseconds
