"""Next-token loss over the learnt positions only, without the logits of a batch.

TRL's fused head makes the logits again in the backward pass, computes entropy and accuracy beside
them, and on a CPU scores every position: with 201,088 logits a token that is much of a step. Here
the head is frozen, so one pass gives the loss and the gradient of the hidden states, and a block
of logits is all that ever exists.
Source: the fused linear cross-entropy of Liger, arXiv:2410.10989, section 3.2.

Ring: edge (live tensors).  Shapes: M learnt positions, H hidden, V vocabulary, K block.
"""

from typing import Any, cast

import torch
from trl.trainer.sft_trainer import SFTTrainer

from tasks.costs import FROZEN_HEAD_ROWS
from tasks.gptoss.attention import told_documents
from tasks.gptoss.head import block_rows, learnt_places, return_loss, score_block
from tasks.gptoss.product import Era
from tasks.gptoss.token_mean import TokenMean
from tasks.gptoss.walks import FewWalks
from tasks.train.sharding import average_gradients


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target]; gradient for the hidden states only."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, float32. Cost: two GEMMs of M x H x V; K x V floats live at once."""
        grad_MH = torch.empty_like(hidden_MH)
        loss = hidden_MH.new_zeros((), dtype=torch.float32)
        size = block_rows(hidden_MH.device, FROZEN_HEAD_ROWS)
        for start in range(0, len(hidden_MH), size):
            block = slice(start, start + size)
            block_loss, _, slope_KV = score_block(hidden_MH[block] @ weight_VH.T, target_M[block])
            loss += block_loss
            torch.mm(slope_KV.to(weight_VH.dtype), weight_VH, out=grad_MH[block])
        ctx.save_for_backward(grad_MH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        """Scale the gradient that forward already knew."""
        (grad_MH,) = ctx.saved_tensors
        return grad_MH * grads[0], None, None


@torch.no_grad()
def has_plain_head(causal: Any) -> bool:  # Any: as for fuse_head
    """Say whether the logits are hidden @ head.T and no more, by asking the model itself.

    Granite and Cohere scale them, Gemma 2 caps them, Phi adds a bias: the loss would be of other logits. Call it in
    eval mode, so that no generator moves. Cost: two passes of two tokens.
    """
    ids = torch.arange(2, device=causal.device)[None]
    said = causal(input_ids=ids, use_cache=False).logits
    plain = (
        causal.base_model(input_ids=ids, use_cache=False).last_hidden_state @ causal.get_output_embeddings().weight.T
    )
    return torch.allclose(said.float(), plain.float(), rtol=1e-2, atol=1e-2 * said.abs().max().item())


def fuse_head(causal: Any) -> None:  # Any: a transformers CausalLM, whose attributes nn.Module doesn't know
    """Let `causal(input_ids, position_ids, labels)` return the loss and no logits; without labels it is as before."""

    def score(hidden_MH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        return FrozenHeadLoss.apply(hidden_MH, causal.get_output_embeddings().weight, target_M)

    return_loss(causal, score)


def _with_learnt(batch: dict[str, Any]) -> dict[str, Any]:  # Any: tensors and numbers
    return batch | {"learnt_M": learnt_places(batch["labels"])}


class TokenMeanTrainer(TokenMean, FewWalks, SFTTrainer):
    """SFTTrainer whose validation loss is the mean over learnt tokens."""

    is_shared_out = False  # FSDP2 (tasks/train/sharding.py): no DDP averages the gradients
    is_placed = False  # its weights lie where they belong, and accelerate must not move them
    is_flash = False  # its attention takes documents, and no mask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as SFTTrainer does."""
        super().__init__(*args, **kwargs)
        self.era = Era()  # for kernels that keep what they made of the adapters: the passes of one step

    def train(self, *args: Any, **kwargs: Any) -> Any:  # Any: Trainer's signature
        """Train; however that ends, adapters may change from there on."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.era.end()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one pass; after the last of a step average the gradients where DDP does not."""
        self.era.begin()
        try:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        except BaseException:
            self.era.end()
            raise
        if self.accelerator.sync_gradients:
            self.era.end()
        if self.is_shared_out and self.accelerator.sync_gradients:
            average_gradients(cast("torch.nn.Module", self.model))
        return loss


class FusedHeadTrainer(TokenMeanTrainer):
    """The same for a model after `fuse_head`: the loss of the learnt positions only, and no metrics of logits.

    What a pass must know of its rows is found while they are on the host: asked of a GPU it would be an answer to wait
    for, and while Python waits it launches nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as SFTTrainer does, and let its collator say which tokens are learnt."""
        super().__init__(*args, **kwargs)
        collate = self.data_collator
        self.data_collator = lambda rows: _with_learnt(collate(rows))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean loss per learnt token of the (accumulated) batch."""
        wanted = {name: inputs[name] for name in ("input_ids", "position_ids", "labels", "learnt_M")}
        if self.is_flash:
            ends, longest = inputs["cu_seq_lens_q"], inputs["max_length_q"]
            wanted["documents"] = told_documents(ends, longest, inputs["input_ids"].numel())
        loss = model(**wanted, num_items_in_batch=num_items_in_batch).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients of ranks
        return loss
