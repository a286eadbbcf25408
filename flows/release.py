"""Merge > publish > serve > verify for an adapter that already exists."""

from flows.prefect_flow import flow
from flows.recipes import RecipeName, resolve
from tasks.artifacts import HealthReport
from tasks.check.task import check_release
from tasks.merge.task import merge_adapter
from tasks.publish.task import publish_model
from tasks.serve.task import serve_again, serve_model
from tasks.specs import RecipeChanges
from tasks.train.task import find_adapter
from tasks.verify.task import verify_model

NO_CHANGES = RecipeChanges()


@flow(
    name="release",
    flow_run_name="release-{adapter}",
    validate_parameters=True,
    on_failure=[serve_again],
    on_cancellation=[serve_again],
    on_crashed=[serve_again],
)
def release(
    adapter: str,
    recipe: RecipeName = "gptoss20b_lora_h100",
    changes: RecipeChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> HealthReport:
    """Release one trained adapter.

    Args:
        adapter: key of a trained adapter (its first digits will do), or `latest` of the recipe's base.
        recipe: whose merge, publish, serve and verify knobs count.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        serving_host: name of a Serving Host block; empty: the recipe's address.
    """
    spec = resolve(recipe, changes)
    check_release(recipe, spec, storage, hub_account, serving_host)
    trained = find_adapter(adapter, spec.base, storage)
    merged = merge_adapter(trained, spec.merge, storage)
    published = publish_model(merged, spec.publish, storage, hub_account)
    served = serve_model(published, spec.serve, storage, serving_host)
    return verify_model(served, spec.verify, storage)
