"""An evaluation's folder: one JSON line for each item that was asked.

Ring: edge (disk).
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks import files
from tasks.artifacts import Evaluation
from tasks.errors import CorruptError
from tasks.evaluate.results import Answered, DocumentLoss, Judged, Metric, Results


def write_results(folder: Path, results: Results) -> None:
    """Write every item as a line of its file."""
    for name in ("documents", "questions", "safety"):
        write_lines(folder / f"{name}.jsonl", [asdict(item) for item in getattr(results, name)])
    files.write_json(folder / "plugins.json", {name: asdict(metric) for name, metric in results.plugins.items()})


def read_results(evaluation: Evaluation) -> Results:
    """Read what `write_results` wrote. Raises CorruptError when a file is not what it should be."""
    folder = evaluation.path
    try:
        return Results(
            documents=[DocumentLoss(**row) for row in read_lines(folder / "documents.jsonl")],
            questions=[Answered(**row) for row in read_lines(folder / "questions.jsonl")],
            safety=[Judged(**row) for row in read_lines(folder / "safety.jsonl")],
            plugins={name: Metric(**value) for name, value in files.read_json(folder / "plugins.json").items()},
        )
    except (OSError, TypeError, ValueError) as error:
        raise CorruptError(f"{folder} does not hold an evaluation ({error}): remove it, it is made again") from error


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:  # Any: JSON values
    """Write rows as JSON lines, whole or not at all."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:  # Any: JSON values
    """Read rows of JSON lines; lists become tuples."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows]
