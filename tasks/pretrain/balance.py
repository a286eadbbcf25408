"""Which experts the tokens go to, and the loss that spreads them.

    router logits of each layer -> balance_loss()      Switch, arXiv:2101.03961, equation 4, with K choices
                                -> count of tokens per expert -> experts.jsonl

transformers' `load_balancing_loss_func` takes the mean over all layers first: an expert that is dead in one layer and
busy in another looks balanced there. Here each layer is balanced by itself, on the same scale (K when balanced).

Ring: edge (live tensors).  Shapes: N tokens, L layers, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import nn


class RouterTap:
    """What the routers of a model said in the pass that is going on; not in one that is made again."""

    def __init__(self, decoder: Any) -> None:  # Any: GptOssModel
        self._is_open, self._logits = False, list[torch.Tensor]()
        decoder.register_forward_pre_hook(self._open)
        for layer in decoder.layers:
            layer.mlp.router.register_forward_hook(self._keep)

    def take(self) -> list[torch.Tensor]:
        """End the pass: return the logits (N, E) of each layer."""
        logits, self._logits, self._is_open = self._logits, [], False
        return logits

    def _open(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        self._is_open, self._logits = True, []

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        del module, args
        if self._is_open:
            self._logits.append(output[0])


def balance_loss(logits_LNE: list[torch.Tensor], num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the balance loss, the mean over layers, and how many tokens went to each expert (L, E).

    Args:
        logits_LNE: what each layer's router said.
        num_chosen: K.
    Loss of a layer: E * sum over experts of (tokens / N) * (mean probability); K when balanced, E at worst (K = 1).
    """
    losses, counts = [], []
    for logits_NE in logits_LNE:
        num_tokens, num_experts = logits_NE.shape
        chosen_NK = logits_NE.detach().topk(num_chosen, dim=-1).indices
        count_E = torch.zeros(num_experts, device=logits_NE.device)
        count_E.scatter_add_(0, chosen_NK.flatten(), torch.ones_like(chosen_NK.flatten(), dtype=count_E.dtype))
        probability_E = logits_NE.float().softmax(-1).mean(0)
        losses.append(num_experts * (count_E / num_tokens * probability_E).sum())
        counts.append(count_E)
    return torch.stack(losses).mean(), torch.stack(counts)


def usage_shares(counts_LE: torch.Tensor) -> list[list[float]]:
    """Return each expert's share of the choices of its layer, for experts.jsonl.

    >>> usage_shares(torch.tensor([[3.0, 1.0]]))
    [[0.75, 0.25]]
    """
    shares_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
    return [[round(share, 5) for share in layer] for layer in shares_LE.tolist()]
