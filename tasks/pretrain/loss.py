"""The loss of a model that is trained whole: next tokens without their logits, and balanced experts.

    causal(input_ids, position_ids, labels) -> loss; what it is made of is added up beside it until it is logged

Ring: edge (live tensors).  Shapes: B rows, T tokens, M learnt positions, H hidden, L layers, E experts.
"""

from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from tasks.gptoss.forward import find_decoder
from tasks.gptoss.head import TrainedHeadLoss
from tasks.pretrain.balance import RouterTap, balance_loss
from tasks.pretrain.rows import NOT_LEARNT


class Scored:
    """Sums since they were last taken: loss, hits, learnt tokens, balance loss by tokens; tokens of each expert."""

    def __init__(self, config: Any, device: torch.device) -> None:  # Any: GptOssConfig
        self.sums_4 = torch.zeros(4, dtype=torch.float64, device=device)
        self.counts_LE = torch.zeros(config.num_hidden_layers, config.num_local_experts, device=device)

    def add(self, loss: torch.Tensor, hits: torch.Tensor, count: torch.Tensor, balance: torch.Tensor) -> None:
        """Add one pass."""
        self.sums_4 += torch.stack([loss.double(), hits.double(), count.double(), (balance * count).double()]).detach()

    def clear(self) -> None:
        """Begin anew."""
        self.sums_4.zero_()
        self.counts_LE.zero_()


def train_head(causal: Any, coef: float) -> None:  # Any: GptOssForCausalLM, whose attributes nn.Module doesn't know
    """Let `causal` return the loss and no logits when it gets labels; without labels it is as before.

    A patched forward, and not a call around the model: DDP and FSDP must see the pass.
    """
    causal.whole_forward, causal.balance_coef = causal.forward, coef
    causal.tap = RouterTap(find_decoder(causal))
    causal.scored = Scored(causal.config, causal.device)
    causal.forward = MethodType(_loss_forward, causal)


def _loss_forward(
    self: Any,  # Any: as above
    input_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    if labels is None:
        return self.whole_forward(input_ids=input_ids, **kwargs)
    self.tap.open()
    hidden_BTH = self.model(
        input_ids=input_ids, position_ids=kwargs.get("position_ids"), use_cache=False
    ).last_hidden_state
    balance, counts_LE = balance_loss(self.tap.take(), self.config.num_experts_per_tok)
    wanted_BT = labels[:, 1:]
    learnt_BT = wanted_BT != NOT_LEARNT
    loss, hits = TrainedHeadLoss.apply(hidden_BTH[:, :-1][learnt_BT], self.lm_head.weight, wanted_BT[learnt_BT])
    count = learnt_BT.sum()
    if self.training:
        self.scored.add(loss, hits, count, balance)
        self.scored.counts_LE += counts_LE
    total = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=loss.device)
    return CausalLMOutput(loss=(loss + self.balance_coef * balance * count) / total.clamp(min=1))
