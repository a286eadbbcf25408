"""Loss, hits and slope of a block of logits: what every fused head here is made of.

Source: the fused linear cross-entropy of Liger, arXiv:2410.10989, section 3.2.

Ring: edge (live tensors).  Shapes: M learnt positions, H hidden, V vocabulary, K block.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from tasks.costs import HEAD_ROWS
from tasks.gptoss.fused import fused

NOT_LEARNT = -100  # a label that is no target, as transformers has it
_CPU_ROWS = 128  # rows of logits that exist at once on a CPU


def block_rows(device: torch.device, gpu_rows: int = HEAD_ROWS) -> int:
    """Return how many rows of logits should exist at once."""
    return gpu_rows if device.type == "cuda" else _CPU_ROWS


def score_block(logits_KV: torch.Tensor, target_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss (float32), how many targets are the likeliest id, and d loss / d logits.

    On a CPU the slope takes the place of float32 logits.
    """
    return (_score_in_one if logits_KV.is_cuda else _score)(logits_KV, target_K)


def _score(logits_KV: torch.Tensor, target_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_KV = logits_KV.float()
    rows_K = torch.arange(len(logits_KV), device=logits_KV.device)
    wanted_K = logits_KV[rows_K, target_K]
    top_K1 = logits_KV.amax(-1, keepdim=True)
    hits = (wanted_K == top_K1[:, 0]).sum()
    logits_KV.sub_(top_K1).exp_()
    total_K1 = logits_KV.sum(-1, keepdim=True)
    loss = (total_K1.log() + top_K1).sum() - wanted_K.sum()
    logits_KV.div_(total_K1)
    logits_KV[rows_K, target_K] -= 1
    return loss, hits, logits_KV


@fused
def _score_in_one(logits_KV: torch.Tensor, target_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as one kernel over the logits, which are read twice and never stored in float32."""
    wide_KV = logits_KV.float()
    total_K1 = wide_KV.logsumexp(-1, keepdim=True)
    wanted_K1 = wide_KV.gather(1, target_K[:, None])
    hits = (wanted_K1 == wide_KV.amax(-1, keepdim=True)).sum()
    is_target_KV = torch.arange(wide_KV.shape[1], device=wide_KV.device) == target_K[:, None]
    slope_KV = (wide_KV - total_K1).exp() - is_target_KV.float()
    return (total_K1 - wanted_K1).sum(), hits, slope_KV.to(logits_KV.dtype)


def return_loss(causal: Any, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Let `causal(input_ids, position_ids, labels)` return the loss and no logits; without labels it is as before.

    A patched forward, and not a call around the model: DDP and FSDP must see the pass. It takes two more that a GPU
    would have to be waited for: `learnt_M`, which tokens are followed by one that is learnt (`learnt_places`), and
    `documents` for `flash_attention`.

    Args:
        causal: a transformers CausalLM, whose attributes nn.Module doesn't know.
        score: of the hidden states (M, H) before each learnt token, and these tokens (M), the summed loss.
    """
    whole = causal.forward

    def forward(
        self: Any,  # Any: as above
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        learnt_M: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return whole(input_ids=input_ids, **kwargs)
        known = {name: kwargs[name] for name in ("position_ids", "documents") if name in kwargs}
        hidden_BTH = self.base_model(input_ids=input_ids, use_cache=False, **known).last_hidden_state
        places_M = learnt_places(labels) if learnt_M is None else learnt_M
        loss = score(_Taken.apply(hidden_BTH.flatten(0, 1), places_M), labels.flatten()[places_M + 1])
        count = len(places_M) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / torch.as_tensor(count).clamp(min=1))

    causal.forward = MethodType(forward, causal)


def learnt_places(labels_BT: torch.Tensor) -> torch.Tensor:
    """Return (M,) which of the B * T tokens are followed by one that is learnt.

    >>> learnt_places(torch.tensor([[-100, 5, -100], [7, -100, 8]])).tolist()
    [0, 4]
    """
    return torch.nn.functional.pad(labels_BT[:, 1:] != NOT_LEARNT, (0, 1)).flatten().nonzero()[:, 0]


class _Taken(torch.autograd.Function):
    """Rows of a matrix, each once: its gradient is a copy, where that of an index is a sort and a sum."""

    @staticmethod
    def forward(ctx: Any, rows_NH: torch.Tensor, places_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places_M)
        ctx.num_rows = len(rows_NH)
        return rows_NH.index_select(0, places_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places_M,) = ctx.saved_tensors
        (grad_MH,) = grads
        return grad_MH.new_zeros(ctx.num_rows, grad_MH.shape[1]).index_copy_(0, places_M, grad_MH), None


class TrainedHeadLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], and hits; gradients for the hidden states and the weight."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_M: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, float32, and the number of hits. Cost: three GEMMs of M x H x V; K x V live at once.

        The weight's gradient is added up in its own dtype, block by block.
        """
        grad_MH, grad_VH = torch.empty_like(hidden_MH), torch.zeros_like(weight_VH)
        loss = hidden_MH.new_zeros((), dtype=torch.float32)
        hits = torch.zeros((), dtype=torch.int64, device=hidden_MH.device)
        size = block_rows(hidden_MH.device)
        for start in range(0, len(hidden_MH), size):
            block = slice(start, start + size)
            block_loss, block_hits, slope_KV = score_block(hidden_MH[block] @ weight_VH.T, target_M[block])
            loss += block_loss
            hits += block_hits
            slope_KV = slope_KV.to(weight_VH.dtype)
            torch.mm(slope_KV, weight_VH, out=grad_MH[block])
            grad_VH.addmm_(slope_KV.T, hidden_MH[block])
        ctx.save_for_backward(grad_MH, grad_VH)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Scale the gradients that forward already knew."""
        grad_MH, grad_VH = ctx.saved_tensors
        return grad_MH * grads[0], grad_VH * grads[0], None
