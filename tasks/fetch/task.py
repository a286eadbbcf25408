"""Prefect's view of fetching: how often it may fail, what it is called, what it shows."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import BaseCheckpoint, FetchedDataset
from tasks.errors import is_worth_retrying
from tasks.specs import BaseModelSpec, FetchSpec


@task(
    task_run_name="fetch-{spec.source}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=2 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def fetch_dataset(spec: FetchSpec, storage: str = "", hub_account: str = "") -> FetchedDataset:
    """Bring the data set here as parquet rows; a second call returns the finished one."""
    from blocks.opening import open_hub, open_store
    from tasks.fetch import report, run
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    dataset = run.fetch_dataset(spec, store, open_hub(hub_account))
    about = (store.manifest(FetchedDataset, dataset.key) or {})["about"]
    show_markdown("data", report.data_markdown(dataset, about), "Rows, what was rejected and why, lengths, one sample")
    return dataset


@task(
    task_run_name="fetch-base-{spec.model}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=6 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def fetch_base(spec: BaseModelSpec, storage: str = "", hub_account: str = "") -> BaseCheckpoint:
    """Bring the base model here; an interrupted download goes on where it was."""
    from blocks.opening import open_hub, open_store
    from tasks.fetch import report, run
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    base = run.fetch_base(spec, store, open_hub(hub_account))
    about = (store.manifest(BaseCheckpoint, base.key) or {})["about"]
    show_markdown("base", report.base_markdown(base, about), "Where the base came from and what it is made of")
    return base
