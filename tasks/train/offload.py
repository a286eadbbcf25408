"""Let the lowest layers of a frozen base rest in the host's memory and pass through the GPU one at a time.

    base -> let_rest(trainer, n) -> layers 0 .. n-1 in pinned memory; while one computes, the next one comes

For layers below the lowest adapter only. The backward pass ends above them, so each comes once a pass and nothing of it
is kept; what is learnt is to the bit what it would be with all of them on the GPU. Experts that are stored in MXFP4
rest and travel packed (tasks/gptoss/packed.py) and are unpacked as they arrive. accelerate's hooks do the same for
inference, without pinned memory and without bringing the next layer beforehand; FSDP2's can't take 4-bit weights.

Cost: a pass takes at least as long as its bytes on the bus, about 50 GB/s on PCIe 5; more tokens in a pass hide it.

Ring: edge (live tensors, CUDA streams).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer

from tasks.errors import TrainingError
from tasks.gptoss.mxfp4 import unpack
from tasks.gptoss.packed import stand_in
from tasks.recorder import say
from tasks.train.sharding import find_layers

_ALIGNED = 256  # bytes: where a weight begins in the buffer of its layer


def let_rest(trainer: SFTTrainer, num_layers: int) -> None:
    """Put a base where it belongs: its lowest layers' matrices into the host's memory, all else on the device.

    Call it when PEFT has wrapped the model, before kernels hold weights of their own.
    """
    model: Any = trainer.model  # Any: a PeftModel; Trainer types it as optional
    device = trainer.accelerator.device
    layers = find_layers(model)[:num_layers]
    if trained := [name for layer in layers for name, weight in layer.named_parameters() if weight.requires_grad]:
        raise TrainingError(
            f"{len(trained)} weights of the {num_layers} layers that rest on the host are trained, first {trained[0]}: "
            "lower TrainSpec.offload_layers"
        )
    resting = {id(weight) for layer in layers for weight in find_resting(layer)}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in resting:
                weight.data = weight.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    passage = Passage(layers, device)
    if device.type == "cuda":  # transformers had reserved the GPU for the whole base
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # mixed precision only
    say(f"{num_layers} layers rest in the host's memory: {passage.num_bytes:,} bytes, {passage.memory}")


def find_resting(layer: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a layer that rest: frozen, and more than a vector (experts and matrices, packed or not)."""
    return [weight for weight in layer.parameters() if weight.ndim > 1 and not weight.requires_grad]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor in a buffer of bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it stands there."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a weight lies in the buffer of its layer: itself, or its blocks and scales when it is packed in MXFP4."""

    weight: nn.Parameter
    parts: tuple[_Part, ...]

    @property
    def is_packed(self) -> bool:
        """Whether it is unpacked as it comes."""
        return len(self.parts) > 1

    def arrive(self, buffer: torch.Tensor) -> None:
        """Let the weight be what the buffer holds, on the buffer's device."""
        views = [part.view(buffer) for part in self.parts]
        self.weight.data = unpack(views[0], views[1], self.weight.dtype) if self.is_packed else views[0]

    def rest(self, buffer: torch.Tensor) -> None:
        """Let the weight lie in the host's buffer; a packed one is there in packed form only."""
        weight = self.weight
        weight.data = stand_in(weight.shape, weight.dtype) if self.is_packed else self.parts[0].view(buffer)


class Passage:
    """Brings resting layers to a device in their order, one ahead, and lets each go when it has computed."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Move the layers' matrices into one buffer of the host each, and hook the layers' forward passes."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[int, tuple[torch.Tensor, Any]] = {}  # Any: a CUDA event, None without CUDA
        self._places: list[list[_Place]] = []
        self._buffers: list[torch.Tensor] = []
        self.memory = "not pinned" if self._stream is None else "pinned"
        for number, layer in enumerate(layers):
            self._move_out(layer)
            layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            layer.register_forward_hook(self._leave(number), always_call=True)  # out of memory, too

    @property
    def num_bytes(self) -> int:
        """What rests."""
        return sum(buffer.numel() for buffer in self._buffers)

    def _move_out(self, layer: nn.Module) -> None:
        packed = {
            id(getattr(module, name)): parts
            for module in layer.modules()
            for name, parts in getattr(module, "packed", {}).items()
        }
        contents = [(weight, packed.get(id(weight), (weight.data,))) for weight in find_resting(layer)]
        end, places = 0, []
        for weight, tensors in contents:
            parts = []
            for tensor in tensors:
                parts.append(_Part(end, tensor.shape, tensor.dtype))
                end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            places.append(_Place(weight=weight, parts=tuple(parts)))
        buffer = torch.empty(end, dtype=torch.uint8)
        for place, (_, tensors) in zip(places, contents, strict=True):
            for part, tensor in zip(place.parts, tensors, strict=True):
                part.view(buffer).copy_(tensor)
            place.rest(buffer)
        for module in layer.modules():
            vars(module).pop("packed", None)  # pages of the files
        if self._stream is not None:
            self._pin(buffer)
        self._places.append(places)
        self._buffers.append(buffer)

    def _pin(self, buffer: torch.Tensor) -> None:
        """Lock the buffer's pages, so that copies run beside the arithmetic.

        Not `pin_memory`, whose allocator rounds each size up to a power of two. Without it all is slower, not wrong.
        """
        cudart: Any = torch.cuda.cudart()  # Any: its stubs may be None
        if int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)):
            self.memory = "some of it not pinned (the system refused), which is slower"

    def _bring(self, number: int) -> None:
        if number >= len(self._buffers) or number in self._coming:
            return
        buffer = self._buffers[number]
        there = torch.empty_like(buffer, device=self._device)
        if self._stream is None:
            self._coming[number] = there.copy_(buffer), None
            return
        # The allocator may give memory of a layer that still computes: wait for what is queued before overwriting it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(buffer, non_blocking=True)
            self._coming[number] = there, self._stream.record_event()

    def _enter(self, number: int) -> Any:  # Any: torch's hook
        def bring_in(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # Any: of any family
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                raise TrainingError(
                    f"layer {number} rests on the host but its input needs a gradient: something below it is trained; "
                    "set TrainSpec.offload_layers to 0"
                )
            self._bring(number)
            there, arrived = self._coming.pop(number)
            if arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
            for place in self._places[number]:
                place.arrive(there)
            self._bring(number + 1)

        return bring_in

    def _leave(self, number: int) -> Any:  # Any: torch's hook
        def let_go(*_: Any) -> None:  # Any: torch's hook signature
            for place in self._places[number]:
                place.rest(self._buffers[number])

        return let_go
