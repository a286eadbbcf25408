"""Stand-ins for commands that this machine lacks, as scripts in a folder for PATH."""

from collections.abc import Mapping
from pathlib import Path


def write_commands(folder: Path, lines: Mapping[str, str]) -> None:
    """Write an executable of bash for each name, in the new or existing folder."""
    folder.mkdir(exist_ok=True)
    for name, line in lines.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
