"""The line: fetch > pack > train > merge > publish > serve > verify."""

from flows.prefect_flow import flow
from flows.recipes import RecipeName, resolve, resolve_base
from tasks.artifacts import HealthReport
from tasks.check.task import check_lengths, check_recipe
from tasks.corpus.task import prepare_corpus
from tasks.fetch.task import fetch_base, fetch_dataset
from tasks.merge.task import merge_adapter
from tasks.pack.task import pack_dataset
from tasks.pretrain.task import pretrain_model
from tasks.publish.task import publish_model
from tasks.serve.task import serve_again, serve_model
from tasks.specs import PretrainChanges, RecipeChanges
from tasks.train.task import train_adapter
from tasks.verify.task import verify_model

NO_CHANGES = RecipeChanges()
NO_BASE_CHANGES = PretrainChanges()


@flow(
    name="finetune",
    flow_run_name="finetune-{recipe}",
    validate_parameters=True,
    on_failure=[serve_again],
    on_cancellation=[serve_again],
    on_crashed=[serve_again],
)
def finetune(
    recipe: RecipeName = "tiny",
    changes: RecipeChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    base_changes: PretrainChanges = NO_BASE_CHANGES,  # type: ignore[valid-type]  # as above
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> HealthReport:
    """Run one recipe end to end; verbs whose artifact is whole already are skipped.

    Args:
        recipe: name of a recipe in flows/recipes.py.
        changes: fields of the recipe to change.
        base_changes: fields to change of the recipe that makes the base, when it is made here.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        serving_host: name of a Serving Host block; empty: the recipe's address.
    """
    spec = resolve(recipe, changes)
    pretraining = resolve_base(spec, base_changes)
    check_recipe(recipe, spec, pretraining, storage, hub_account, serving_host)
    dataset = fetch_dataset(spec.fetch, storage, hub_account)
    check_lengths(dataset, spec, pretraining, storage, hub_account)
    if pretraining:
        corpus = prepare_corpus(pretraining, storage, hub_account)
        base = pretrain_model(pretraining, corpus, storage)
    else:
        base = fetch_base(spec.base, storage, hub_account)
    packed = pack_dataset(dataset, base, spec.pack, storage)
    adapter = train_adapter(packed, base, spec.train, storage)
    merged = merge_adapter(adapter, spec.merge, storage)
    published = publish_model(merged, spec.publish, storage, hub_account)
    served = serve_model(published, spec.serve, storage, serving_host)
    return verify_model(served, spec.verify, storage)
