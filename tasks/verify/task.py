"""Prefect's view of verification."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import HealthReport, ServedModel
from tasks.errors import AttestationError, is_worth_retrying
from tasks.specs import VerifySpec


@task(
    task_run_name="verify-{served.short}",
    retries=2,
    retry_delay_seconds=[5, 20],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,  # a failed attestation is final
    timeout_seconds=2 * 3600,
    cache_policy=NO_CACHE,  # always runs: the answer depends on the world
)
def verify_model(served: ServedModel, spec: VerifySpec, storage: str = "", *, remember: bool = True) -> HealthReport:
    """Prove that the endpoint serves what was trained.

    `remember`: a model that passes is what to go back to from now on; a promotion says so later.
    """
    from blocks.opening import open_store
    from tasks.prefect_ui import show_markdown
    from tasks.serve import handover
    from tasks.verify import run
    from tasks.verify.report import health_markdown

    def show(report: HealthReport, about: dict[str, object]) -> None:
        show_markdown("health-report", health_markdown(report, about), "Scores and a sample answer")

    store = open_store(storage)
    try:
        report = run.verify_model(served, spec, store, show)
    except AttestationError:  # what failed must not stay in front of clients; a candidate never was
        if not served.candidate_slot:
            get_run_logger().error("%s", handover.restore(store.root, served.model_folder))
        raise
    if remember:
        handover.remember_verified(store.root, served.model_folder)
    return report
