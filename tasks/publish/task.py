"""Prefect's view of publishing."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import MergedModel, PublishedModel, TrainedAdapter, TrainedModel
from tasks.errors import is_worth_retrying
from tasks.specs import PublishSpec


@task(
    task_run_name="publish-{source.short}",
    retries=4,
    retry_delay_seconds=[10, 60, 300, 900],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,  # a wrong token stays wrong
    timeout_seconds=12 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def publish_model(
    source: MergedModel | TrainedAdapter | TrainedModel,
    spec: PublishSpec,
    storage: str = "",
    hub_account: str = "",
) -> PublishedModel:
    """Publish to the Hub, or to a local folder in Hub layout when no repo and token are given."""
    from blocks.opening import open_hub, open_store
    from tasks.prefect_ui import show_link, show_markdown
    from tasks.publish import run

    published = run.publish_model(source, spec, open_store(storage), open_hub(hub_account))
    show_markdown("model-card", (published.path / "model" / "README.md").read_text(), "The model card")
    if published.place == "hub":
        show_link("published-model", published.pull_request or published.url, published.repo_id)
    return published
