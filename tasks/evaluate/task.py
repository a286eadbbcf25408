"""Prefect's view of the evaluation gate."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import Decision, ServedModel
from tasks.errors import is_worth_retrying
from tasks.specs import EvaluateSpec


@task(
    task_run_name="evaluate-{served.short}",
    retries=2,
    retry_delay_seconds=[5, 20],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,  # a GateError is final
    timeout_seconds=12 * 3600,
    cache_policy=NO_CACHE,  # evaluations are found by the model's digest; the decision is asked for each deploy
)
def evaluate_candidate(
    served: ServedModel, spec: EvaluateSpec, storage: str = "", incumbent: ServedModel | None = None
) -> Decision:
    """Let a served candidate pass the gate, or fail with the figures.

    `incumbent` is what it would replace; None: the last verified model, else the last promoted one.
    """
    import json

    from blocks.opening import open_store
    from tasks.evaluate import run
    from tasks.prefect_ui import show_link, show_markdown, show_table
    from tasks.serve import handover

    def show(decision: Decision, report: str, rows: list[dict[str, Any]]) -> None:  # Any: cells of a table
        show_markdown("evaluation", report, "Candidate, incumbent and base; every check of the rule")
        show_table("evaluation-differences", rows, "Questions that candidate and another model answer differently")
        show_link("evaluation-files", decision.path.as_uri(), "report.md and differences.jsonl")

    store = open_store(storage)
    verified = handover.last_verified(store.root)
    if incumbent is not None:
        ids = json.dumps({"TATARA_MODEL_DIGEST": incumbent.model_digest})
        verified = {"model": incumbent.model_folder, "ids": ids}
    return run.evaluate_candidate(served, spec, store, show, verified)


@task(task_run_name="find-served-{served}", cache_policy=NO_CACHE)
def find_served(served: str, storage: str = "") -> ServedModel:
    """Return a served model by its key's first digits, or the latest."""
    from blocks.opening import open_store
    from tasks.evaluate import subjects

    return subjects.find_served(served, open_store(storage))
