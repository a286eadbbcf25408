"""PPO on Ray: questions and base > verl's main_ppo on a cluster > a whole model > publish > serve > verify."""

from flows.prefect_flow import flow
from flows.recipes import PpoName, resolve_ppo
from tasks.artifacts import HealthReport, PublishedModel
from tasks.check.task import check_ppo
from tasks.fetch.task import fetch_base
from tasks.ppo.task import prepare_questions, reinforce_model
from tasks.publish.task import publish_model
from tasks.serve.task import serve_again, serve_model
from tasks.specs import PpoChanges
from tasks.verify.task import verify_model

NO_CHANGES = PpoChanges()


@flow(
    name="reinforce-ppo",
    flow_run_name="reinforce-ppo-{recipe}",
    validate_parameters=True,
    on_failure=[serve_again],
    on_cancellation=[serve_again],
    on_crashed=[serve_again],
)
def reinforce_ppo(
    recipe: PpoName = "llama1b_ppo_h100",
    changes: PpoChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> HealthReport | PublishedModel:
    """Train a model with rewards by PPO; a model that is whole already is found, a job that runs is followed.

    Args:
        recipe: name of a recipe in flows/recipes.py; its `until` says whether the model is served.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME. Every node of the cluster has to see it.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        serving_host: name of a Serving Host block; empty: the recipe's address.
    """
    spec = resolve_ppo(recipe, changes)
    check_ppo(recipe, spec, storage, hub_account, serving_host)
    questions = prepare_questions(spec.questions, storage, hub_account)
    base = fetch_base(spec.base, storage, hub_account)
    model = reinforce_model(questions, base, spec, storage)
    published = publish_model(model, spec.publish, storage, hub_account)
    if spec.until == "publish":
        return published
    served = serve_model(published, spec.serve, storage, serving_host)
    return verify_model(served, spec.verify, storage)
