"""Fewer walks over all modules and parameters, for any of transformers' trainers.

Ring: edge (live modules).
"""

from typing import Any

import torch


class FewWalks:
    """Put before a trainer's class: Trainer counts the parameters and sets the mode of every module in each pass.

    Neither changes meanwhile. A gpt-oss-20b with adapters has 2,565 modules, and while Python goes through them no
    kernel is launched.
    """

    model: Any  # a PreTrainedModel, or a PeftModel, which hands on what it is asked
    _num_counted: int | None = None
    _taught: torch.nn.Module | None = None  # every module of it is in training mode, unless it was judged since

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one pass; a model that is in training mode is left so.

        Two models are asked whether they are: evaluation takes the one inside DDP out of it, and leaves DDP in. And no
        model is asked in its first pass: PEFT's around a loaded base is in it, and the base is not.
        """
        trainer: Any = super()  # Any: the class that this was put before
        if model is not self._taught or not (model.training and self.model.training):
            self._taught = model
            return trainer.training_step(model, *args, **kwargs)
        vars(model)["train"] = lambda: model
        try:
            return trainer.training_step(model, *args, **kwargs)
        finally:
            del vars(model)["train"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # Any: tensors
        """Return what Trainer's own does: 6 x tokens x parameters without the embeddings. It goes into checkpoints."""
        if self._num_counted is None:
            self._num_counted = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._num_counted
