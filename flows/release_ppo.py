"""Publish > serve > verify for a model that PPO made: where the cluster that trained it serves nothing."""

from flows.prefect_flow import flow
from flows.recipes import PpoName, resolve_ppo
from tasks.artifacts import HealthReport
from tasks.check.task import check_release
from tasks.ppo.task import find_reinforced
from tasks.publish.task import publish_model
from tasks.serve.task import serve_again, serve_model
from tasks.specs import PpoChanges
from tasks.verify.task import verify_model

NO_CHANGES = PpoChanges()


@flow(
    name="release-ppo",
    flow_run_name="release-ppo-{recipe}-{model}",
    validate_parameters=True,
    on_failure=[serve_again],
    on_cancellation=[serve_again],
    on_crashed=[serve_again],
)
def release_ppo(
    recipe: PpoName = "llama1b_ppo_h100",
    model: str = "latest",
    changes: PpoChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> HealthReport:
    """Release one model that was trained with rewards.

    Args:
        recipe: PPO recipe; its publish, serve and verify knobs count.
        model: key of a reinforced model (its first digits will do), or `latest` of the recipe's base.
        changes: fields of those knobs to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        serving_host: name of a Serving Host block; empty: the recipe's address.
    """
    spec = resolve_ppo(recipe, changes)
    reinforced = find_reinforced(model, spec.base, storage)
    check_release(recipe, spec, storage, hub_account, serving_host, reinforced)
    published = publish_model(reinforced, spec.publish, storage, hub_account)
    served = serve_model(published, spec.serve, storage, serving_host)
    return verify_model(served, spec.verify, storage)
