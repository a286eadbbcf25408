"""Train only the ids that a corpus holds, under the full softmax.

A corpus of a few thousand distinct tokens under a vocabulary of 201,088 would spend nearly all of
its time in two huge matrices of which it touches 2 %. With `compact_vocabulary` the model is
trained on the corpus' own ids and one class for all the rest, whose rows of the output matrix are
tied to one vector: its logit is raised by log(number of the rest), so the loss is exactly the full
softmax of the model that is saved, where each row of the rest is that vector.

Ring: edge (live tensors).  Shapes: B rows, T tokens, V vocabulary, S seen ids.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import GptOssForCausalLM

from tasks.pretrain.trainer import MasterTrainer


class Vocabulary:
    """Which ids are trained under which class: the corpus' own, then one class for all the rest."""

    def __init__(self, ids_N: torch.Tensor, vocab_size: int, *, is_compact: bool) -> None:
        self.seen_S = ids_N.unique() if is_compact else torch.arange(vocab_size)
        self.num_rest = vocab_size - len(self.seen_S)
        self._class_V = torch.full((vocab_size,), len(self.seen_S))
        self._class_V[self.seen_S] = torch.arange(len(self.seen_S))

    @property
    def num_classes(self) -> int:
        """S, and one more when there is a rest."""
        return len(self.seen_S) + (self.num_rest > 0)

    def classes(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Return the class of each id."""
        return self._class_V[ids_N]


class TiedRestTrainer(MasterTrainer):
    """Trainer whose last class stands for `num_rest` ids of equal logit."""

    loss_is_scaled_for_ga = False  # a mean over one pass; the passes of a step have as many tokens each

    def __init__(self, *args: Any, vocabulary: Vocabulary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary
        self.rest_bias = math.log(vocabulary.num_rest) if vocabulary.num_rest else 0.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean next-token loss of the batch under the full softmax."""
        logits_BTS = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        if self.rest_bias:
            logits_BTS = torch.cat([logits_BTS[..., :-1], logits_BTS[..., -1:] + self.rest_bias], -1)
        return functional.cross_entropy(logits_BTS.flatten(0, 1), inputs["labels"][:, 1:].flatten())


@torch.no_grad()
def expand(
    trained: GptOssForCausalLM, vocabulary: Vocabulary, build: Callable[[], GptOssForCausalLM]
) -> GptOssForCausalLM:
    """Return the full-vocabulary model that computes the same: each id gets the rows of its class.

    Input rows of ids that the corpus never held keep their random start (`build`): nothing is known of them.
    """
    if not vocabulary.num_rest:
        return trained
    full = build()
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    state = {name: tensor for name, tensor in trained.state_dict().items() if name not in tables}
    full.load_state_dict(state, strict=False)
    seen_S = vocabulary.seen_S.to(trained.device)
    full.lm_head.weight[:] = trained.lm_head.weight[-1]
    full.lm_head.weight[seen_S] = trained.lm_head.weight[:-1]
    full.model.embed_tokens.weight[seen_S] = trained.model.embed_tokens.weight[:-1]
    return full
