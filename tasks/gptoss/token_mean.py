"""A validation loss that is the mean over tokens, for any of transformers' trainers.

Ring: edge (live tensors).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Trainer

from tasks.errors import DataError
from tasks.gptoss.head import NOT_LEARNT

_Trainer = Trainer if TYPE_CHECKING else object  # put before a trainer's class, whichever that is


class TokenMean(_Trainer):
    """The validation loss is the mean over learnt tokens, however rows are cut into passes.

    Trainer's own is the mean over passes: a run that was cut anew after an out of memory would compare one kind with
    another, and a pass with one learnt token would weigh as much as a full one.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; `eval_loss` is the summed loss by the number of learnt tokens. Raises DataError without any."""
        self._scored_2 = torch.zeros(2, dtype=torch.float64)  # loss, learnt tokens
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss, count = self._scored_2.tolist()
        if not count:
            raise DataError("no validation row holds a token that is learnt: give a split with answers")
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / count
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score one pass, and add what it is made of."""
        scored: Any = super().prediction_step(model, inputs, *args, **kwargs)
        count = (inputs["labels"][:, 1:] != NOT_LEARNT).sum().to(scored[0].device)
        loss = scored[0].detach().double()
        gather = cast("Callable[[torch.Tensor], torch.Tensor]", self.gather_function)  # untyped there
        self._scored_2 += gather(torch.stack([loss * count, count.double()])[None]).sum(0).cpu()
        return scored
