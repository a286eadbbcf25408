"""Ports for servers of tests: each is handed out once, and nothing else on the machine is given it by chance.

A port that the kernel chose (bind to 0, close, hand the number on) can be given to any connection or server that
starts in between: with four test processes that happened. Ours lie below the kernel's range, and each test process
has a slice of its own.
"""

import os
import random
import socket

_FIRST, _SLICE, _NUM_SLICES = 12_000, 1_200, 16  # up to 31,199: Linux gives out 32,768 and above


def _begin() -> int:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return _FIRST + int(worker) % _NUM_SLICES * _SLICE


_next = random.SystemRandom().randrange(_SLICE)  # another pytest in another checkout starts elsewhere


def free_port() -> int:
    """Return a port of the loopback on which nothing is bound, one that this process has not returned before."""
    global _next
    for _ in range(_SLICE):
        port = _begin() + _next % _SLICE
        _next += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port in {_begin()}..{_begin() + _SLICE - 1}")
