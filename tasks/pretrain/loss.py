"""The loss of a model that is trained whole: next tokens without their logits, and balanced experts.

    causal(input_ids, position_ids, labels) -> loss; what it is made of is added up beside it until it is logged

Ring: edge (live tensors).  Shapes: B rows, T tokens, M learnt positions, H hidden, L layers, E experts.
"""

from typing import Any

import torch

from tasks.gptoss.forward import find_decoder
from tasks.gptoss.head import TrainedHeadLoss, return_loss
from tasks.pretrain.balance import RouterTap, balance_loss


class Scored:
    """Sums since they were last taken: loss, hits, learnt tokens, balance loss by tokens; tokens of each expert."""

    def __init__(self, config: Any, device: torch.device) -> None:  # Any: GptOssConfig
        self.sums_4 = torch.zeros(4, dtype=torch.float64, device=device)
        self.counts_LE = torch.zeros(config.num_hidden_layers, config.num_local_experts, device=device)

    def add(
        self, loss: torch.Tensor, hits: torch.Tensor, count: int, balance: torch.Tensor, counts_LE: torch.Tensor
    ) -> None:
        """Add one pass."""
        parts = (loss, hits, loss.new_tensor(count), balance * count)
        self.sums_4 += torch.stack([part.detach().double() for part in parts])
        self.counts_LE += counts_LE

    def clear(self) -> None:
        """Begin anew."""
        self.sums_4.zero_()
        self.counts_LE.zero_()


def train_head(causal: Any, coef: float) -> None:  # Any: GptOssForCausalLM, whose attributes nn.Module doesn't know
    """Let `causal(input_ids, position_ids, labels)` return the loss, in training with `coef` times the balance loss.

    What that is made of is added up in `causal.scored`.
    """
    tap = RouterTap(find_decoder(causal))
    causal.scored = Scored(causal.config, causal.device)

    def score(hidden_MH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        loss, hits = TrainedHeadLoss.apply(hidden_MH, causal.lm_head.weight, target_M)
        balance, counts_LE = balance_loss(tap.take(), causal.config.num_experts_per_tok)
        if not causal.training:
            return loss
        causal.scored.add(loss, hits, len(target_M), balance, counts_LE)
        return loss + coef * balance * len(target_M)

    return_loss(causal, score)
