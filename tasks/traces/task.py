"""Prefect's view of the drain: which connections, and how often it may fail."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import is_transient
from tasks.traces.spec import DrainReport, DrainSpec


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
    from blocks.trace_queue import TraceQueue
    from blocks.weave_project import WeaveProject
    from tasks.traces import run

    queue: Any = TraceQueue.load(trace_queue) if trace_queue else None  # Any: load() is typed as maybe a coroutine
    weave: Any = WeaveProject.load(weave_project) if weave_project else None  # Any: the same
    return run.drain_traces(
        run.open_queue(queue.path, queue.client()) if queue else run.queue_from_environment(),
        run.weave_sink(weave.client(), weave.project_id, spec) if weave else run.sink_from_environment(spec),
        spec,
    )
