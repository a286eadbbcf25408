"""Prefect's view of serving."""

from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import PublishedModel, ServedModel
from tasks.errors import is_worth_retrying
from tasks.specs import ServeSpec

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

    store, host, hub = open_store(storage), open_host(serving_host), open_hub(hub_account)
    served = run.serve_model(published, spec, store, host, flow_run.id or "", hub)
    show_link("gateway", f"{served.gateway_url}/health", f"gateway of {served.served_model_name}")
    return served


def serve_again(flow: "Flow[Any, Any]", flow_run: "FlowRun", state: "State") -> None:  # Any: whichever flow failed
    """Flow hook for a run that failed or was cancelled: what it stopped to make way is served again."""
    from prefect.logging.loggers import flow_run_logger

    from blocks.opening import open_store
    from tasks.serve import handover

    said = handover.serve_again(open_store((flow_run.parameters or {}).get("storage") or "").root)
    if said:
        flow_run_logger(flow_run).error("%s", said)
