"""Prefect's view of packing."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import BaseCheckpoint, FetchedDataset, PackedDataset
from tasks.errors import is_worth_retrying
from tasks.specs import PackSpec


@task(
    task_run_name="pack-{dataset.short}",
    retries=1,
    retry_delay_seconds=10,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=6 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def pack_dataset(dataset: FetchedDataset, base: BaseCheckpoint, spec: PackSpec, storage: str = "") -> PackedDataset:
    """Tokenise and pack; a second call returns the finished one."""
    from blocks.opening import open_store
    from tasks.pack import report, run  # datasets and trl: loaded where they run
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    packed = run.pack_dataset(dataset, base, spec, store)
    about = (store.manifest(PackedDataset, packed.key) or {})["about"]
    show_markdown("packing", report.packing_markdown(packed, about), "Lengths, density and one rendered sample")
    return packed
