"""Prefect's view of training."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.errors import is_worth_retrying
from tasks.specs import BaseModelSpec, TrainSpec


@task(
    task_run_name="train-{packed.short}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,  # never out of memory, never a bad target
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def train_adapter(packed: PackedDataset, base: BaseCheckpoint, spec: TrainSpec, storage: str = "") -> TrainedAdapter:
    """Train the adapter in a process of its own; resumes from the newest whole checkpoint."""
    from blocks.opening import open_store
    from tasks.metrics import read_metrics
    from tasks.pictures import loss_curve
    from tasks.prefect_ui import Progress, show_markdown, show_picture
    from tasks.serve import handover
    from tasks.targets import targets_markdown
    from tasks.train import run

    show_markdown("targets", targets_markdown(run.plan_targets(base, spec.lora)), "What the adapter is put on")
    store, progress = open_store(storage), Progress("train-progress", "Optimizer steps")
    adapter = run.train_adapter(packed, base, spec, store, progress, lambda: handover.free_gpu(store.root))
    marks = {
        "validation loss before": adapter.validation_loss_before,
        "validation loss after": adapter.validation_loss_after,
    }
    records, evaluations = (read_metrics(adapter.path / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    picture = loss_curve(records, f"Adapter {adapter.short}", marks, evaluations)
    show_picture("loss-curve", picture, "Training loss by step, validation loss before and after")
    return adapter


@task(task_run_name="find-adapter-{name}", cache_policy=NO_CACHE)
def find_adapter(name: str, base: BaseModelSpec, storage: str = "") -> TrainedAdapter:
    """Find a trained adapter by the first digits of its key, or the newest of this base as `latest`."""
    from blocks.opening import open_store
    from tasks.train import run

    return run.find_adapter(name, base, open_store(storage))
