"""Tensors that a forward pass made and the backward pass wants rest in the host's memory meanwhile.

    put after they are made -> they leave on a stream of their own -> bring, a layer ahead -> take

The gate's argument is by far the widest tensor that a layer keeps. On PCIe 5 it goes in 3.6 ms for 4,096 tokens of
gpt-oss-20b; a layer computes for 2.5 ms forward and 5 ms back, so every second one can go unnoticed, where making it
again costs a GEMM. TRL's activation offloading would send all that is kept, more than the bus carries.

Ring: edge (live tensors, CUDA streams).
"""

from collections import deque
from typing import Any

import torch


def shelved_layers(num_layers: int, lowest: int, count: int) -> frozenset[int]:
    """Return which layers' gates rest on the host: every second one first, the lowest first, never the last.

    The last layer's would come back at once.

    >>> sorted(shelved_layers(8, 0, 2)), sorted(shelved_layers(8, 1, 5)), sorted(shelved_layers(2, 0, 9))
    ([0, 2], [1, 2, 3, 4, 5], [0])
    """
    trained = range(lowest, num_layers - 1)
    return frozenset([*trained[::2], *trained[1::2]][:count])


def new_page(num_bytes: int, *, is_pinned: bool) -> torch.Tensor:
    """Return memory of the host, pinned if asked where the system does not refuse: else all is slower, not wrong."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    except RuntimeError:  # what CUDA says of too much pinned memory is one, too
        if not is_pinned:
            raise
        return torch.empty(num_bytes, dtype=torch.uint8)


class Ticket:
    """What was put, and where it is now."""

    def __init__(self, layer: int, page: torch.Tensor, like: torch.Tensor, shelf: "Shelf") -> None:
        """Stand for what `page` begins with, of the shape, dtype and device of `like`."""
        self.layer, self._page, self._shelf = layer, page, shelf
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device
        self._there: torch.Tensor | None = None
        self._arrived: Any = None  # Any: a CUDA event

    def bring(self) -> None:
        """Let it start on its way back; nothing if it did."""
        if self._page is None:
            return
        self._shelf.settle()
        self._there = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if self._there.is_cuda:
            stream = self._shelf.stream(self._device)
            # The allocator may give memory of a kernel that still runs: wait for what is queued before overwriting it.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._there.copy_(as_laid(self._page, self._there), non_blocking=True)
                self._arrived = stream.record_event()
        else:
            self._there.copy_(as_laid(self._page, self._there))
        page, self._page = self._page, None
        self._shelf.give_back(page)

    def take(self) -> torch.Tensor:
        """Return it, once: the taker may write over it."""
        self.bring()
        there, self._there = self._there, None
        assert there is not None
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        return there


def as_laid(page: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the beginning of a page as a tensor of that shape and dtype."""
    return page[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class Shelf:
    """Pinned memory of the host for what waits, and the stream on which it goes there and back.

    Pages are its own and used again at once. torch's allocator would wait for their copies, and while Python is ahead
    of the GPU it would pin more: 256 MB for a gate of gpt-oss-20b, for tens of milliseconds each.
    """

    def __init__(self) -> None:
        """Begin empty; pages and the stream are made when they are needed."""
        self._leaving: deque[tuple[int, torch.Tensor, Any]] = deque()  # Any: a CUDA event
        self._stream: torch.cuda.Stream | None = None
        self._last: Ticket | None = None
        self._free: list[torch.Tensor] = []

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of the copies: one, so that no page is read unwritten or overwritten unread."""
        self._stream = self._stream or torch.cuda.Stream(device)
        return self._stream

    def put(self, layer: int, tensor: torch.Tensor) -> Ticket:
        """Let a tensor leave, which nobody writes to any more. Its memory is given back by `settle`."""
        page = self._find_page(tensor.numel() * tensor.element_size(), is_pinned=tensor.is_cuda)
        if tensor.is_cuda:
            stream = self.stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                as_laid(page, tensor).copy_(tensor, non_blocking=True)
                self._leaving.append((layer, tensor, stream.record_event()))
        else:
            as_laid(page, tensor).copy_(tensor)
        self._last = Ticket(layer, page, tensor, self)
        return self._last

    def _find_page(self, num_bytes: int, *, is_pinned: bool) -> torch.Tensor:
        while self._free:
            page = self._free.pop()
            if len(page) >= num_bytes:
                return page  # a smaller one is let go: rows are of one length, but for a last batch
        return new_page(num_bytes, is_pinned=is_pinned)

    def give_back(self, page: torch.Tensor) -> None:
        """Take a page whose last copy is on its way: the next one waits for it on the same stream."""
        self._free.append(page)

    def settle(self, layer: int | None = None) -> None:
        """Give back the memory of what has left; in the forward pass of `layer` not yet what the layer below put.

        Computation waits for a copy that is not done; without that the allocator would have to take more memory.
        """
        while self._leaving and (layer is None or self._leaving[0][0] != layer - 1):
            _, tensor, left = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(left)

    def below(self, layer: int) -> Ticket | None:
        """Return what the layer below `layer` put in this pass, for `layer` to bring in its backward pass."""
        last = self._last
        return last if last is not None and last.layer == layer - 1 else None
