"""Prefect's view of merging."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import MergedModel, TrainedAdapter
from tasks.errors import is_worth_retrying
from tasks.specs import MergeSpec


@task(
    task_run_name="merge-{adapter.short}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=6 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def merge_adapter(adapter: TrainedAdapter, spec: MergeSpec, storage: str = "") -> MergedModel:
    """Merge the adapter into its base; a second call returns the finished one."""
    from blocks.opening import open_store
    from tasks.merge import report, run  # torch: loaded where it runs, not where it is deployed
    from tasks.prefect_ui import show_markdown, show_table

    store = open_store(storage)
    merged = run.merge_adapter(adapter, spec, store)
    about = (store.manifest(MergedModel, merged.key) or {})["about"]
    show_markdown("merge-ledger", report.ledger_markdown(merged, about), "Which tensor got which change")
    show_table("merge-changes", about["ledger"], "One row for each changed tensor: LoRA pair, scale, norm, shard")
    return merged
