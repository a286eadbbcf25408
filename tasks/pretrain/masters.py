"""An optimizer of bfloat16 weights that steps in float32.

    weight = bfloat16(master), low = bits(master) - bits(weight): together the float32 master, to the bit

An update smaller than half a step of bfloat16 would be lost, and with it everything that a run learns at small rates.
Two bytes a parameter keep it: half of what float32 masters beside bfloat16 weights take. The optimizer itself, any of
torch's, transformers' or bitsandbytes', sees float32 parameters that exist only while it steps.
Source: Split-SGD, arXiv:2005.04680, section VII; here the weight is the nearest bfloat16, not the truncated one.

Ring: edge (live tensors).  Shapes: N elements of a weight, or of the part of it that this process has.
Trap: float32 values of more than 3.39e38 round to infinity; a gradient that is not finite ends the run before.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tasks.gptoss.fused import fused

_AT_ONCE = 1 << 27  # elements whose float32 master and gradient exist at once: 1.1 GB


@fused
def split(master_N: torch.Tensor, weight_N: torch.Tensor, low_N: torch.Tensor) -> None:
    """Store float32 values as the nearest bfloat16, ties away from zero, and the bits that it lacks (int16).

    >>> weight, low = torch.empty(2).bfloat16(), torch.empty(2).short()
    >>> split(torch.tensor([1.0 + 2**-20, -3.14159]), weight, low)
    >>> weight.tolist(), low.tolist(), join(weight, low)[0].item() == 1.0 + 2**-20
    ([1.0, -3.140625], [8, 4048], True)
    """
    bits_N = master_N.view(torch.int32)
    nearest_N = (bits_N + 0x8000) & -0x10000
    weight_N.copy_(nearest_N.view(torch.float32))
    low_N.copy_(bits_N - nearest_N)


@fused
def join(weight_N: torch.Tensor, low_N: torch.Tensor) -> torch.Tensor:
    """Return the float32 master of what `split` stored."""
    return (weight_N.float().view(torch.int32) + low_N).view(torch.float32)


class SplitMasters(torch.optim.Optimizer):
    """The optimizer of a model's bfloat16 weights, its steps taken on their float32 masters.

    Of weights that FSDP2 shares out it steps each process' own part, which every element-wise optimizer allows.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Not Optimizer's own: groups and state are the inner one's, whose parameters become the masters.
        self.inner = inner
        self.weights: list[nn.Parameter] = []
        for group in inner.param_groups:
            self.weights += group["params"]
            group["params"] = [nn.Parameter(local(weight).new_empty(0).float()) for weight in group["params"]]
        self.masters: list[nn.Parameter] = [master for group in inner.param_groups for master in group["params"]]
        self.lows = [torch.zeros_like(_flat(weight), dtype=torch.int16) for weight in self.weights]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # Any: as torch has it
        """The inner optimizer's: rates and decays are set there."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # Any: as torch has it
        """The inner optimizer's moments."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # Any: as torch has it
        """The inner optimizer's."""
        return self.inner.defaults

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch's signature; never given
        """Step; gradients are gone afterwards."""
        assert closure is None
        for numbers in self._batches():
            for number in numbers:
                weight, master = self.weights[number], self.masters[number]
                slope: Any = weight.grad  # Any: torch types it as optional
                weight.grad = None
                master.data = join(_flat(weight), self.lows[number]).view_as(local(weight))
                master.grad = local(slope).float()
                del slope
            self.inner.step()
            for number in numbers:
                master = self.masters[number]
                split(master.data.view(-1), _flat(self.weights[number]), self.lows[number])
                master.data, master.grad = master.data.new_empty(0), None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the weights."""
        del set_to_none
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:  # Any: as torch has it
        """Return the inner optimizer's state, and the bits that the weights lack, in the weights' shapes."""
        lows = [low.view_as(local(weight)) for low, weight in zip(self.lows, self.weights, strict=True)]
        return {"inner": self.inner.state_dict(), "lows": lows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as torch has it
        """Take up what `state_dict` returned; the weights are loaded by whoever has them."""
        self.inner.load_state_dict(state_dict["inner"])
        for mine, low in zip(self.lows, state_dict["lows"], strict=True):
            mine.copy_(low.view(-1))

    def _batches(self) -> Iterator[list[int]]:
        """Yield numbers of weights with a gradient, as many as may have their masters at once."""
        numbers: list[int] = []
        for number, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            if numbers and sum(self.lows[one].numel() for one in (*numbers, number)) > _AT_ONCE:
                yield numbers
                numbers = []
            numbers.append(number)
        if numbers:
            yield numbers


def local(value: Any) -> torch.Tensor:  # Any: a tensor, shared out or not
    """Return this process' part of a tensor, all of one that is not shared out."""
    return value.to_local() if isinstance(value, DTensor) else value


def _flat(weight: nn.Parameter) -> torch.Tensor:
    return local(weight.detach()).view(-1)
