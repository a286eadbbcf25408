"""Prefect's view of the check before a run, which also stores the resolved recipe."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from tasks.artifacts import FetchedDataset, TrainedModel
from tasks.errors import is_worth_retrying
from tasks.specs import BaseRelease, PpoRecipe, PretrainSpec, Recipe, ReinforceRecipe, Spec

_WHEN = {"retries": 2, "retry_delay_seconds": [5, 30], "retry_jitter_factor": 0.5, "timeout_seconds": 300}
_RETRYING = {**_WHEN, "retry_condition_fn": is_worth_retrying, "cache_policy": NO_CACHE}  # the world changes


@task(task_run_name="check-{name}", **_RETRYING)
def check_recipe(
    name: str,
    recipe: Recipe | ReinforceRecipe,
    pretraining: PretrainSpec | None,
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
) -> None:
    """Store the resolved recipe with the run, then say all that can't work before long work starts."""
    from blocks.opening import open_host, open_hub, open_store
    from tasks.check import run

    _keep_recipe(name, recipe, storage, pretraining)
    store, host = open_store(storage), open_host(serving_host)
    _show_checks(run.check_recipe(recipe, pretraining, store, open_hub(hub_account), host))


@task(task_run_name="check-{name}", **_RETRYING)
def check_release(
    name: str,
    recipe: Recipe | BaseRelease | PpoRecipe,
    storage: str = "",
    hub_account: str = "",
    serving_host: str = "",
    whole: TrainedModel | None = None,
) -> None:
    """The same for a run that begins with the merge, or with a model that was trained here as a `whole`."""
    from blocks.opening import open_host, open_hub, open_store
    from tasks.check import run

    _keep_recipe(name, recipe, storage)
    _show_checks(run.check_release(recipe, open_store(storage), open_hub(hub_account), open_host(serving_host), whole))


@task(task_run_name="check-{name}", **_RETRYING)
def check_publish(name: str, recipe: Recipe, storage: str = "", hub_account: str = "") -> None:
    """The same for a run that ends with the publication."""
    from blocks.opening import open_hub, open_store
    from tasks.check.run import check_publish

    _keep_recipe(name, recipe, storage)
    _show_checks(check_publish(recipe, open_store(storage), open_hub(hub_account)))


@task(task_run_name="check-{name}", **_RETRYING)
def check_pretrain(name: str, spec: PretrainSpec, storage: str = "", hub_account: str = "") -> None:
    """The same for a run that pretrains."""
    from blocks.opening import open_hub, open_store
    from tasks.check import run

    _keep_recipe(name, spec, storage)
    _show_checks(run.check_pretrain(spec, open_store(storage), open_hub(hub_account)))


@task(task_run_name="check-{name}", **_RETRYING)
def check_ppo(name: str, recipe: PpoRecipe, storage: str = "", hub_account: str = "", serving_host: str = "") -> None:
    """The same for a run on a Ray cluster, which is looked at before anything is downloaded."""
    from blocks.opening import open_host, open_hub, open_store
    from tasks.check.ppo import check_ppo

    _keep_recipe(name, recipe, storage)
    _show_checks(check_ppo(recipe, open_store(storage), open_hub(hub_account), open_host(serving_host)))


@task(task_run_name="check-lengths-{dataset.short}", **_RETRYING)
def check_lengths(
    dataset: FetchedDataset, recipe: Recipe, pretraining: PretrainSpec | None, storage: str = "", hub_account: str = ""
) -> None:
    """Say which row is longer than a packed row before the base is downloaded or made."""
    from blocks.opening import open_hub, open_store
    from tasks.check.lengths import check_lengths
    from tasks.prefect_ui import show_markdown

    said = check_lengths(dataset, recipe, pretraining, open_store(storage), open_hub(hub_account))
    show_markdown("lengths", said, "Whether every row fits a packed row")


def _keep_recipe(name: str, recipe: Spec, storage: str = "", pretraining: PretrainSpec | None = None) -> None:
    """Store the resolved recipe with the run, as a file and as an artifact."""
    from blocks.opening import open_store
    from tasks.check import run
    from tasks.prefect_ui import show_markdown

    kept = run.keep_recipe(name, recipe, open_store(storage).root / "runs" / str(flow_run.get_id()), pretraining)
    show_markdown("recipe", f"```json\n{kept.read_text()}\n```", f"The resolved recipe {name}")


def _show_checks(said: list[str]) -> None:
    from tasks.prefect_ui import show_markdown

    show_markdown("checks", "\n".join(f"- {line}" for line in said), "What was checked before the run")
