"""PPO on Ray: questions and base > verl's main_ppo on a cluster > a whole model."""

from prefect import flow

from flows.recipes import PpoName, resolve_ppo
from tasks.artifacts import ReinforcedModel
from tasks.check.task import check_ppo
from tasks.fetch.task import fetch_base
from tasks.ppo.task import prepare_questions, reinforce_model
from tasks.specs import PpoChanges

NO_CHANGES = PpoChanges()


@flow(name="reinforce-ppo", flow_run_name="reinforce-ppo-{recipe}", validate_parameters=True)
def reinforce_ppo(
    recipe: PpoName = "llama1b_ppo_h100",
    changes: PpoChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
) -> ReinforcedModel:
    """Train a model with rewards by PPO; a model that is whole already is found, a job that runs is followed.

    Args:
        recipe: name of a recipe in flows/recipes.py.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME. Every node of the cluster has to see it.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
    """
    spec = resolve_ppo(recipe, changes)
    check_ppo(recipe, spec, storage, hub_account)
    questions = prepare_questions(spec.questions, storage, hub_account)
    base = fetch_base(spec.base, storage, hub_account)
    return reinforce_model(questions, base, spec, storage)
