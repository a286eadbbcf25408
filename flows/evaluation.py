"""The evaluation gate for a model that is served now: measure it, its base and the incumbent, and decide.

Not flows/evaluate.py: Prefect puts this folder first on sys.path, and lm-eval imports a package `evaluate`.
"""

from flows.prefect_flow import flow
from flows.recipes import RecipeName, resolve
from tasks.artifacts import Decision
from tasks.evaluate.task import evaluate_candidate, find_served
from tasks.specs import RecipeChanges

NO_CHANGES = RecipeChanges()


@flow(name="evaluate", flow_run_name="evaluate-{served}", validate_parameters=True)
def evaluate(
    served: str = "latest",
    recipe: RecipeName = "gptoss20b_lora_h100",
    changes: RecipeChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
) -> Decision:
    """Evaluate one served model; it must be running.

    Args:
        served: key of a served model (its first digits will do), or `latest`.
        recipe: whose evaluate knobs count.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
    """
    spec = resolve(recipe, changes)
    return evaluate_candidate(find_served(served, storage), spec.evaluate, storage)
