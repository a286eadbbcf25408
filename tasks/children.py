"""Child processes that end with their parent: PEFT, transformers, lm_eval, each for the length of one question.

    run_child(argv, variables, log) -> exit code
    bound(argv)                     -> the same words, for a child that runs beside its parent's own work

What must outlive its parent (trainers, vLLM, the gateway) is in processes.py.

Ring: edge.  Units: seconds.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_BINDER = Path(__file__).with_name("ends_with_parent.py")


def bound(argv: Sequence[str]) -> list[str]:
    """Return a command that is ended when the thread that starts it ends: that thread has to wait for it."""
    return [sys.executable, "-I", "-S", str(_BINDER), str(os.getpid()), *argv]


def run_child(
    argv: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    *,
    folder: Path | None = None,
    timeout_s: float | None = None,
) -> int:
    """Run a command to its end, output in `log`; return its exit code. It does not outlive this process.

    Raises: subprocess.TimeoutExpired after `timeout_s`; the child is ended then.
    """
    with log.open("wb") as output:
        return subprocess.run(
            bound(argv),
            env=dict(variables),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        ).returncode
