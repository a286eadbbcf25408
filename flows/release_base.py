"""Publish > serve > verify for a model that was pretrained here."""

from flows.prefect_flow import flow
from flows.recipes import PretrainName, resolve_base_release, resolve_every_pretrain
from tasks.artifacts import HealthReport
from tasks.check.task import check_release
from tasks.pretrain.task import find_pretrained
from tasks.publish.task import publish_model
from tasks.serve.task import serve_again, serve_model
from tasks.specs import BaseReleaseChanges
from tasks.verify.task import verify_model

NO_CHANGES = BaseReleaseChanges()


@flow(
    name="release-base",
    flow_run_name="release-base-{recipe}-{model}",
    validate_parameters=True,
    on_failure=[serve_again],
    on_cancellation=[serve_again],
    on_crashed=[serve_again],
)
def release_base(
    recipe: PretrainName = "compact_1b4",
    model: str = "latest",
    changes: BaseReleaseChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> HealthReport:
    """Release one pretrained model.

    Args:
        recipe: pretraining recipe; its publish, serve and verify knobs count.
        model: key of a pretrained model (its first digits will do), or `latest` of the recipe.
        changes: fields of those knobs to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
        serving_host: name of a Serving Host block; empty: the recipe's address.
    """
    spec = resolve_base_release(recipe, changes)
    pretrained = find_pretrained(model, recipe, resolve_every_pretrain(), storage)
    check_release(recipe, spec, storage, hub_account, serving_host, pretrained)
    published = publish_model(pretrained, spec.publish, storage, hub_account)
    served = serve_model(published, spec.serve, storage, serving_host)
    return verify_model(served, spec.verify, storage)
