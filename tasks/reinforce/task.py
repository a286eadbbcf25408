"""Prefect's view of learning from rewards."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.errors import is_worth_retrying
from tasks.specs import ReinforceSpec


@task(
    task_run_name="reinforce-{packed.short}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def reinforce_adapter(
    packed: PackedDataset,
    base: BaseCheckpoint,
    spec: ReinforceSpec,
    start: TrainedAdapter | None = None,
    storage: str = "",
) -> TrainedAdapter:
    """Learn from rewards in a process of its own; resumes from the newest whole checkpoint."""
    from blocks.opening import open_store
    from tasks.metrics import read_metrics
    from tasks.pictures import reward_curves, reward_histograms
    from tasks.prefect_ui import Progress, show_markdown, show_picture
    from tasks.reinforce import run
    from tasks.reinforce.report import rewards_markdown
    from tasks.serve import handover
    from tasks.targets import targets_markdown

    show_markdown("targets", targets_markdown(run.check_reinforcement(base, spec, start)), "What the adapter is put on")
    store, progress = open_store(storage), Progress("reinforce-progress", "Optimizer steps")
    room = lambda: handover.free_gpu(store.root)  # noqa: E731
    adapter = run.reinforce_adapter(packed, base, spec, store, progress, start=start, make_room=room)
    records = read_metrics(adapter.path / "metrics.jsonl")
    found = (store.manifest(TrainedAdapter, adapter.key) or {}).get("about", {}).get("rewards", {})
    columns = [reward.column for reward in spec.rewards]
    show_markdown("rewards", rewards_markdown(found), "What the completions were worth")
    show_picture("reward-curves", reward_curves(records, columns, f"Adapter {adapter.short}"), "Rewards by step")
    show_picture("reward-distributions", reward_histograms(found, f"Adapter {adapter.short}"), "Each reward's spread")
    return adapter
