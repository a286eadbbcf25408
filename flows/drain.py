"""Deliver the gateway's queued traces: to Weave with a W&B key, else to a W&B offline run.

    queue (Redis stream or JSONL) -> drain_traces -> report, kept as the artifact trace-ingestion

Meant to run every few minutes, one at a time; two at once do no harm. A drain that fails leaves the
artifact as well: how much waits, since when, why, and what to do.
"""

from flows.prefect_flow import flow
from tasks.traces.spec import DrainReport, DrainSpec
from tasks.traces.task import drain_traces, publish_report, publishing_failure

DEFAULTS = DrainSpec()


@flow(name="ingest-traces", flow_run_name="ingest-traces")
def drain(spec: DrainSpec = DEFAULTS, trace_queue: str = "", weave_project: str = "") -> DrainReport:
    """Drain the queue once.

    Args:
        spec: batch sizes, time limit and patience.
        trace_queue: name of a Trace Queue block; empty: REDIS_URL and FILE_QUEUE_PATH.
        weave_project: name of a Weave Project block; empty: WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT.
    """
    with publishing_failure(trace_queue):
        report = drain_traces(spec, trace_queue, weave_project)
    publish_report(report)
    return report


if __name__ == "__main__":
    drain()
