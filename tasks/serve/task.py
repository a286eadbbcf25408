"""Prefect's view of serving."""

from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.input import RunInput

from tasks.artifacts import HealthReport, PublishedModel, ServedModel
from tasks.errors import PromotionError, is_worth_retrying
from tasks.specs import Recipe, ServeSpec

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun


@task(
    task_run_name="serve-{published.short}",
    retries=1,
    retry_delay_seconds=10,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,  # always runs: the answer depends on the world
)
def serve_model(
    published: PublishedModel, spec: ServeSpec, storage: str = "", serving_host: str = "", hub_account: str = ""
) -> ServedModel:
    """Start vLLM, then the gateway; what serves this model already is kept."""
    from prefect.runtime import flow_run

    from blocks.opening import open_host, open_hub, open_store
    from tasks.prefect_ui import show_link
    from tasks.serve import run

    place = run.Place(host=open_host(serving_host), run_id=flow_run.id or "", hub=open_hub(hub_account))
    served = run.serve_model(published, spec, open_store(storage), place)
    show_link("gateway", f"{served.gateway_url}/health", f"gateway of {served.served_model_name}")
    return served


@task(task_run_name="find-{model}", cache_policy=NO_CACHE)
def find_published(model: str, storage: str = "") -> PublishedModel:
    """Return the published model of this key, or the `latest`."""
    from blocks.opening import open_store
    from tasks.serve import run

    return run.find_published(model, open_store(storage))


@task(
    task_run_name="candidate-{published.short}",
    retries=1,
    retry_delay_seconds=10,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,
)
def start_candidate(
    published: PublishedModel, recipe: Recipe, storage: str = "", serving_host: str = "", hub_account: str = ""
) -> ServedModel:
    """Start the new model beside the one that serves; in its place where memory does not hold both."""
    from prefect.runtime import flow_run

    from blocks.opening import open_host, open_hub, open_store
    from tasks.serve import run

    place = run.Place(host=open_host(serving_host), run_id=flow_run.id or "", hub=open_hub(hub_account))
    return run.start_candidate(published, recipe, open_store(storage), place)


@task(task_run_name="shift-to-{candidate.short}", timeout_seconds=24 * 3600, cache_policy=NO_CACHE)
def shift_traffic(candidate: ServedModel, recipe: Recipe, storage: str = "", serving_host: str = "") -> ServedModel:
    """Give the new model a share of the requests, then all; what does worse is taken away again.

    With all of them it is what to go back to from now on.
    """
    from prefect.runtime import flow_run

    from blocks.opening import open_host, open_store
    from tasks.prefect_ui import show_markdown
    from tasks.serve import handover, run

    def show(said: str) -> None:
        show_markdown("canary", f"# Canary of {candidate.served_model_name}\n\n{said}", "Requests of both models")

    store, place = open_store(storage), run.Place(host=open_host(serving_host), run_id=flow_run.id or "")
    try:
        served = run.shift_traffic(candidate, recipe, store, place, show)
    except PromotionError as error:
        show(f"NOT PROMOTED: {error}")
        raise
    handover.remember_verified(store.root, served.model_folder)
    return served


@task(task_run_name="retire-others-than-{served.short}", timeout_seconds=24 * 3600, cache_policy=NO_CACHE)
def retire(served: ServedModel, recipe: Recipe, storage: str = "", serving_host: str = "") -> ServedModel:
    """Stop the model that served before, after its last answers."""
    from prefect import get_run_logger

    from blocks.opening import open_host, open_store
    from tasks.serve import run

    said = run.retire_others(served, recipe, open_store(storage), run.Place(host=open_host(serving_host)))
    get_run_logger().info("%s", said)
    return served


class Approval(RunInput):
    """What a person says of a new model that was verified and serves nobody yet."""

    approve: bool
    reason: str = ""


def ask_approval(report: HealthReport, *, wanted: bool) -> None:
    """Pause the flow until a person approves, when that is wanted. Called by a flow, not a task: only a flow can pause.

    Raises: PromotionError when the answer is no; Prefect's FlowPauseTimeout when nobody answers within a day.
    """
    from prefect import pause_flow_run

    if not wanted:
        return
    said = (
        f"**{report.served_model_name}** passed its attestation: {report.served_logprob:.4f} nats per token, its base "
        f"{report.base_logprob:.4f}. Asked {report.question!r} it says: {report.answer!r}. Shall it serve?"
    )
    answer = pause_flow_run(wait_for_input=Approval.with_initial_data(description=said), timeout=24 * 3600)
    if not answer.approve:
        raise PromotionError(f"the new model was not approved: {answer.reason or 'no reason was given'}")


def roll_back(flow: "Flow[Any, Any]", flow_run: "FlowRun", state: "State") -> None:  # Any: whichever flow failed
    """Flow hook for a promotion that failed, crashed or was cancelled: what served before has all requests again."""
    from prefect.logging.loggers import flow_run_logger

    from blocks.opening import open_store
    from tasks.serve import handover, promotion

    root, run = open_store((flow_run.parameters or {}).get("storage") or "").root, str(flow_run.id)
    said = handover.go_back(root, run) or promotion.roll_back(root, run)
    flow_run_logger(flow_run).error("%s", said)


def serve_again(flow: "Flow[Any, Any]", flow_run: "FlowRun", state: "State") -> None:  # Any: whichever flow failed
    """Flow hook for a run that failed, crashed or was cancelled: what it stopped to make way is served again."""
    from prefect.logging.loggers import flow_run_logger

    from blocks.opening import open_store
    from tasks.serve import handover

    said = handover.serve_again(open_store((flow_run.parameters or {}).get("storage") or "").root)
    if said:
        flow_run_logger(flow_run).error("%s", said)
