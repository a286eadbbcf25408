"""Run the code cells of a notebook in order, as one process without IPython: `python tests/notebooks.py NOTEBOOK`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    """The cells of one kind."""
    return [cell for cell in json.loads((NOTEBOOKS / name).read_text())["cells"] if cell["cell_type"] == kind]


def start(
    name: str, variables: dict[str, str], log: Path, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """Begin to run a notebook in a session of its own, output in `log`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    with log.open("ab") as output:
        argv = [sys.executable, __file__, name]
        return subprocess.Popen(
            argv, env=env, cwd=NOTEBOOKS, stdin=stdin, stdout=output, stderr=output, start_new_session=True
        )


def run(name: str, variables: dict[str, str], log: Path, timeout_s: float = 280) -> tuple[int, str]:
    """Run a notebook to its end; return exit code and all that it said."""
    begun = log.stat().st_size if log.exists() else 0
    process = start(name, variables, log)
    try:
        code = process.wait(timeout_s)
    finally:
        process.kill()
    return code, log.read_bytes()[begun:].decode()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    sys.path.pop(0)  # tests/: a kernel has the notebook's folder there
    sys.path.insert(0, "")
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(sys.argv[1])):
        exec(compile("".join(cell["source"]), f"{sys.argv[1]}, code cell {number}", "exec"), space)
