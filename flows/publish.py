"""Publish an adapter that already exists: merged, alone, or both."""

from flows.prefect_flow import flow
from flows.recipes import RecipeName, resolve
from tasks.artifacts import PublishedModel
from tasks.check.task import check_publish
from tasks.merge.task import merge_adapter
from tasks.publish.task import publish_model
from tasks.specs import RecipeChanges
from tasks.train.task import find_adapter

NO_CHANGES = RecipeChanges()


@flow(name="publish", flow_run_name="publish-{adapter}", validate_parameters=True)
def publish(
    adapter: str,
    recipe: RecipeName = "gptoss20b_lora_h100",
    changes: RecipeChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
) -> PublishedModel:
    """Publish one trained adapter and serve nothing; an adapter alone needs no merge.

    Args:
        adapter: key of a trained adapter (its first digits will do), or `latest` of the recipe's base.
        recipe: whose merge and publish knobs count.
        changes: fields of the recipe to change, such as {"publish": {"what": "adapter"}}.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
    """
    spec = resolve(recipe, changes)
    check_publish(recipe, spec, storage, hub_account)
    trained = find_adapter(adapter, spec.base, storage)
    source = trained if spec.publish.what == "adapter" else merge_adapter(trained, spec.merge, storage)
    return publish_model(source, spec.publish, storage, hub_account)
