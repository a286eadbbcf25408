"""Prefect's view of the drain: which connections, and how often it may fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.errors import is_transient
from tasks.traces.spec import DrainReport, DrainSpec, failure_markdown

_ARTIFACT = "trace-ingestion"


def _is_worth_retrying(task: Any, task_run: Any, state: Any) -> bool:  # Any: Prefect's generic Task and State
    return isinstance(state.data, Exception) and is_transient(state.data)


@task(
    task_run_name="drain-traces",
    retries=3,
    retry_delay_seconds=[5, 15, 45],
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_worth_retrying,
    timeout_seconds=900,
    cache_policy=NO_CACHE,  # the answer depends on the world, not on the inputs
)
def drain_traces(spec: DrainSpec, trace_queue: str = "", weave_project: str = "") -> DrainReport:
    """Drain the queue once. Block names that are empty mean: as the environment says."""
    from blocks.weave_project import WeaveProject
    from tasks.traces import run

    weave: Any = (
        WeaveProject.load(weave_project) if weave_project else None
    )  # Any: load() is typed as maybe a coroutine
    return run.drain_traces(
        _open_queue(trace_queue),
        run.weave_sink(weave.client(), weave.project_id, spec) if weave else run.sink_from_environment(spec),
        spec,
    )


def publish_report(report: DrainReport) -> None:
    """Keep the report as an artifact of this run."""
    create_markdown_artifact(report.to_markdown(), key=_ARTIFACT, description="Traces delivered by this run")


@contextmanager
def publishing_failure(trace_queue: str = "") -> Iterator[None]:
    """Leave an artifact with lag, reason and advice when the drain fails, too."""
    from tasks.traces import run

    try:
        yield
    except Exception as error:
        try:
            lag = run.queue_lag(_open_queue(trace_queue))
        except Exception:  # noqa: BLE001 - the drain's own error is the one to show
            lag = None
        text = failure_markdown(error, lag, datetime.now(UTC))
        create_markdown_artifact(text, key=_ARTIFACT, description="The drain failed; nothing is lost")
        raise


def _open_queue(trace_queue: str) -> Any:  # Any: run is not loaded where a flow is deployed
    from blocks.trace_queue import TraceQueue
    from tasks.traces import run

    queue: Any = TraceQueue.load(trace_queue) if trace_queue else None  # Any: as above
    return run.open_queue(queue.path, queue.client()) if queue else run.queue_from_environment()
