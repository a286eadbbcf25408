"""How many requests run at once, and who is next: bounded, and fair between keys.

    Gate.try_enter() -> run -> Gate.leave()
    Gate.wait(key)   -> run -> Gate.leave()      when all places are taken

Whoever waits is served in turn by key (or by address, without keys), so one client that sends a
thousand requests delays another by one request, not by a thousand. A full waiting room gives the place
of the longest queue's last request to a shorter queue; nothing grows without a bound.

Ring: edge (the loop's futures and clock).  Units: seconds.
"""

import asyncio
from collections import OrderedDict, deque


class BusyError(Exception):
    """No place was free in time, or the waiting room is full."""


class Gate:
    """`places` may run, `room` may wait, each for `wait_s` at most."""

    def __init__(self, places: int, room: int, wait_s: float) -> None:
        self.num_running = 0
        self.num_waiting = 0
        self._places = places
        self._room = room
        self._wait_s = wait_s
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def try_enter(self) -> bool:
        """Take a place when one is free and nobody waits for it."""
        if self.num_running >= self._places or self.num_waiting:
            return False
        self.num_running += 1
        return True

    async def wait(self, key: str) -> None:
        """Wait for a place. Raises BusyError."""
        self._make_room(key)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except TimeoutError:
            if not _was_granted(turn):  # else its turn came in the same instant
                raise BusyError(f"no place was free within {self._wait_s:g} s") from None
        except asyncio.CancelledError:
            if _was_granted(turn):
                self.leave()  # its turn came as it went away
            raise
        finally:
            self._forget(key, turn)

    def leave(self) -> None:
        """Give the place to the next one in turn."""
        self.num_running -= 1
        while self._queues and self.num_running < self._places:
            key, queue = next(iter(self._queues.items()))
            turn = self._pop(key, queue, last=False)
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)

    def _pop(self, key: str, queue: "deque[asyncio.Future[None]]", *, last: bool) -> "asyncio.Future[None]":
        turn = queue.pop() if last else queue.popleft()
        self.num_waiting -= 1
        if queue:
            self._queues.move_to_end(key)
        else:
            del self._queues[key]
        return turn

    def _make_room(self, key: str) -> None:
        if self.num_waiting < self._room:
            return
        longest = max(self._queues, key=lambda name: len(self._queues[name]), default=key)
        own = len(self._queues.get(key, ()))
        if longest == key or len(self._queues.get(longest, ())) <= own + 1:
            raise BusyError("too many requests wait already")
        turn = self._pop(longest, self._queues[longest], last=True)
        if not turn.done():
            turn.set_exception(BusyError("others wait too and this client has the most requests waiting"))

    def _forget(self, key: str, turn: "asyncio.Future[None]") -> None:
        queue = self._queues.get(key)
        if queue is not None and turn in queue:
            queue.remove(turn)
            self.num_waiting -= 1
            if not queue:
                del self._queues[key]


def _was_granted(turn: "asyncio.Future[None]") -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None
