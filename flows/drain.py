"""Deliver the gateway's queued traces: to Weave with a W&B key, else to a W&B offline run.

    queue (Redis stream or JSONL) -> drain_traces -> report, kept as the artifact trace-ingestion

Meant to run every few minutes, one at a time; two at once do no harm.
"""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from tasks.traces.spec import DrainReport, DrainSpec
from tasks.traces.task import drain_traces

DEFAULTS = DrainSpec()


@flow(name="ingest-traces", flow_run_name="ingest-traces")
def drain(spec: DrainSpec = DEFAULTS, trace_queue: str = "", weave_project: str = "") -> DrainReport:
    """Drain the queue once.

    Args:
        spec: batch sizes, time limit and patience.
        trace_queue: name of a Trace Queue block; empty: REDIS_URL and FILE_QUEUE_PATH.
        weave_project: name of a Weave Project block; empty: WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT.
    """
    report = drain_traces(spec, trace_queue, weave_project)
    create_markdown_artifact(report.to_markdown(), key="trace-ingestion", description="Traces delivered by this run")
    return report


if __name__ == "__main__":
    drain()
