"""Next-token loss over the learnt positions only, for machines without Triton.

TRL's fused head scores just the learnt positions on a GPU; on a CPU it scores every position,
several passes each, and 201,088 logits a token make that nearly the whole step. Here the head is
frozen, so one pass gives the loss and the gradient of the hidden states, and a block of logits
is all that ever exists.
Source: the fused linear cross-entropy of Liger, arXiv:2410.10989, section 3.2.

Ring: edge (live tensors).  Shapes: M learnt positions, H hidden, V vocabulary, K block.
"""

from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

_BLOCK = 128


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target]; gradient for the hidden states only."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, float32. Cost: two GEMMs of M x H x V; K x V floats live at once."""
        grad_MH = torch.empty_like(hidden_MH)
        loss = hidden_MH.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_MH), _BLOCK):
            block = slice(start, start + _BLOCK)
            logits_KV = (hidden_MH[block] @ weight_VH.T).float()
            rows_K = torch.arange(len(logits_KV), device=logits_KV.device)
            wanted_K = logits_KV[rows_K, target_M[block]]
            top_K1 = logits_KV.amax(-1, keepdim=True)
            logits_KV.sub_(top_K1).exp_()
            total_K1 = logits_KV.sum(-1, keepdim=True)
            loss += (total_K1.log() + top_K1).sum() - wanted_K.sum()
            logits_KV.div_(total_K1)
            logits_KV[rows_K, target_M[block]] -= 1
            grad_MH[block] = logits_KV.to(weight_VH.dtype) @ weight_VH
        ctx.save_for_backward(grad_MH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        """Scale the gradient that forward already knew."""
        (grad_MH,) = ctx.saved_tensors
        return grad_MH * grads[0], None, None


class CpuSFTTrainer(SFTTrainer):
    """SFTTrainer whose loss skips the positions that are not learnt, on any device."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean loss per learnt token of the (accumulated) batch."""
        causal = self.accelerator.unwrap_model(model).get_base_model()
        hidden_BTH = causal.base_model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).last_hidden_state
        wanted_BT = inputs["labels"][:, 1:]
        learnt_BT = wanted_BT != -100
        head = causal.get_output_embeddings()
        loss = FrozenHeadLoss.apply(hidden_BTH[:, :-1][learnt_BT], head.weight, wanted_BT[learnt_BT])
        count = learnt_BT.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients of ranks
        return loss
