"""Run a command that the kernel ends with the process that asked for it, also when that is killed with SIGKILL.

    python -I -S ends_with_parent.py PARENT COMMAND...             ended by SIGKILL
    python -I -S ends_with_parent.py PARENT:SIGNAL COMMAND...      ended by signal number SIGNAL

The process becomes the command, so whatever is run need not know of it: a worker of ours, lm_eval of a user. Run by
its path, it needs the standard library only. Not `preexec_fn`: Python code between fork and exec can hang where the
parent has threads, and Prefect's do.

Ring: edge (Linux).
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> None:
    """Become the command."""
    asked, *command = words
    parent, _, number = asked.partition(":")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number or signal.SIGKILL))  # kept across exec
    if os.getppid() != int(parent):
        sys.exit("the process that asked is gone")
    os.execvp(command[0], command)  # noqa: S606 - no shell


if __name__ == "__main__":
    main(sys.argv[1:])
