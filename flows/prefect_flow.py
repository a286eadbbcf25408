"""Prefect's `flow`, imported faster; flow files take it from here.

Prefect's 1,100 modules are most of what importing a flow takes. Two things about Python make them slower than they are:

- Its cyclic garbage collector looks at the 180,000 objects that come, and stay, again and again: it is paused.
- Python up to 3.12 keeps the frames of running functions in chunks of 16 KiB and frees a chunk whenever its last frame
  ends. A loop that happens to call across the end of a chunk asks the kernel for memory at each turn
  (https://github.com/python/cpython/issues/142183; mended in 3.13, 3.14 and later), and Prefect's import is deep and
  works in loops. It starts in a chunk that it does not leave.

Where Prefect is loaded already, as in the processes that its workers start, nothing is won.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["flow"]

_STACK_SLOTS = 1 << 16  # of 8 bytes: such a frame makes a chunk of 1 MiB, and half of it is left for what it calls


def _load_prefect() -> ModuleType:
    import prefect.main  # what `from prefect import flow` loads

    return prefect


_load_prefect.__code__ = _load_prefect.__code__.replace(co_stacksize=_STACK_SLOTS)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Collect no cycles inside; the collector goes on after it, also when the block raises, unless it was off before.

    It is off in the other threads too: cycles that they drop meanwhile wait until after the block. What came inside
    goes to the oldest generation, where it would have ended up, because the first collection after the block would
    look at all of it otherwise. That takes microseconds, and nothing is kept for ever: the next full collection frees
    the cycles in it. It is left out where somebody froze objects, because theirs would thaw.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()


with _collector_paused():
    _load_prefect()
    from prefect import flow
