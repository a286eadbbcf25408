"""The real worker on a machine whose memory takes one row: what a GPU does, which tests have not."""

import sys
from pathlib import Path
from typing import Any

import torch

from tasks import files
from tasks.train import worker
from tasks.train.loss import FusedHeadTrainer
from tasks.training import run_worker

_step = FusedHeadTrainer.training_step


def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """From the sixth step on two rows are too many."""
    if self.state.global_step >= 5 and self.args.per_device_train_batch_size > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return _step(self, model, inputs, *args, **kwargs)


if __name__ == "__main__":
    FusedHeadTrainer.training_step = training_step
    job = files.read_json(Path(sys.argv[1]))
    run_worker(Path(job["folder"]), lambda: worker.train(job))
