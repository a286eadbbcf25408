"""A published model takes over: start beside > verify > evaluate > (approve) > canary > all > retire the old one."""

from flows.prefect_flow import flow
from flows.recipes import RecipeName, resolve
from tasks.artifacts import ServedModel
from tasks.evaluate.task import evaluate_candidate
from tasks.serve.task import (
    ask_approval,
    find_published,
    retire,
    roll_back,
    serve_again,
    shift_traffic,
    start_candidate,
)
from tasks.specs import RecipeChanges
from tasks.verify.task import verify_model

NO_CHANGES = RecipeChanges()


@flow(
    name="promote",
    flow_run_name="promote-{model}",
    validate_parameters=True,
    on_failure=[roll_back, serve_again],
    on_cancellation=[roll_back, serve_again],
    on_crashed=[roll_back, serve_again],  # its worker runs them when the flow's own process was killed
)
def promote(
    model: str = "latest",
    recipe: RecipeName = "gptoss20b_lora_h100",
    changes: RecipeChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    serving_host: str = "",
    hub_account: str = "",
    approve: bool = False,
) -> ServedModel:
    """Put a published model in front of clients, and take it away again when it does worse than the old one.

    Args:
        model: key of a published model (its first digits will do), its repo, or `latest`.
        recipe: whose serve, verify, evaluate and promote knobs count.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        serving_host: name of a Serving Host block; empty: the recipe's address.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        approve: pause before the first request of a client goes there, until a person says yes.
    """
    spec = resolve(recipe, changes)
    published = find_published(model, storage)
    candidate = start_candidate(published, spec, storage, serving_host, hub_account)
    report = verify_model(candidate, spec.verify, storage, remember=False)
    evaluate_candidate(candidate, spec.evaluate, storage)
    ask_approval(report, wanted=approve)
    served = shift_traffic(candidate, spec, storage, serving_host)
    return retire(served, spec, storage, serving_host)
