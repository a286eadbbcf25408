"""Prefect's view of the check before a run, which also stores the resolved recipe."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from tasks.errors import is_worth_retrying
from tasks.specs import PretrainSpec, Recipe


@task(
    task_run_name="check-{name}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=300,
    cache_policy=NO_CACHE,  # the world changes
)
def check_recipe(
    name: str, recipe: Recipe, pretraining: PretrainSpec | None, storage: str = "", hub_account: str = ""
) -> None:
    """Store the resolved recipe with the run, then say all that can't work before long work starts."""
    from blocks.opening import open_hub, open_store
    from tasks.check import run
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    run.keep_recipe(name, recipe, store.root / "runs" / str(flow_run.get_id()))
    show_markdown("recipe", f"```json\n{recipe.model_dump_json(indent=2)}\n```", f"The resolved recipe {name}")
    said = run.check_recipe(recipe, pretraining, store, open_hub(hub_account))
    show_markdown("checks", "\n".join(f"- {line}" for line in said), "What was checked before the run")
