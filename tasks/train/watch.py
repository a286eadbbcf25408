"""Put on a trainer what watches it: records, checkpoints, the best adapter.

Ring: edge; runs inside the trainer process.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from trl.trainer.sft_trainer import SFTTrainer

from tasks.costs import peak_flops
from tasks.recorder import Measures, Recorder
from tasks.specs import TrainSpec
from tasks.train.best import BestKeeper


def watch(trainer: SFTTrainer, job: dict[str, Any], spec: TrainSpec) -> None:  # Any: JSON values
    """Add the callbacks that every training has."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    measures = Measures(
        row_tokens=count_tokens(Path(job["packed_folder"]) / "train.parquet"),
        rows_per_step=spec.rows_per_device * spec.gradient_accumulation * spec.num_processes,
        flops_per_token=job.get("flops_per_token", 0.0),
        peak_flops=spec.num_processes * peak_flops(device),
        explosion_factor=spec.explosion_factor,
        explosion_steps=spec.explosion_steps,
    )
    trainer.add_callback(Recorder(Path(job["folder"]), measures))
    trainer.add_callback(BestKeeper(trainer, spec))


def count_tokens(parquet: Path) -> list[int]:
    """Return the number of tokens of each packed row."""
    column = pq.read_table(parquet, columns=["input_ids"])["input_ids"]
    lengths: Any = pc  # Any: pyarrow's stubs lack its generated functions
    return lengths.list_value_length(column).to_pylist()
