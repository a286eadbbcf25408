"""Prefect's view of PPO on Ray."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import BaseCheckpoint, PreparedQuestions, ReinforcedModel
from tasks.errors import is_worth_retrying
from tasks.specs import BaseModelSpec, PpoRecipe, QuestionsSpec


@task(
    task_run_name="prepare-{spec.source}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def prepare_questions(spec: QuestionsSpec, storage: str = "", hub_account: str = "") -> PreparedQuestions:
    """Bring the questions here in verl's columns; a second call returns the finished ones."""
    from blocks.opening import open_hub, open_store
    from tasks.ppo import prepare
    from tasks.ppo.report import questions_markdown
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    questions = prepare.prepare_questions(spec, store, open_hub(hub_account))
    about = (store.manifest(PreparedQuestions, questions.key) or {})["about"]
    show_markdown("questions", questions_markdown(questions, about), "Questions, what was rejected, one sample")
    return questions


@task(task_run_name="find-reinforced-{name}", cache_policy=NO_CACHE)
def find_reinforced(name: str, base: BaseModelSpec, storage: str = "") -> ReinforcedModel:
    """Find a model that PPO made by the first digits of its key, or the newest of this base as `latest`."""
    from blocks.opening import open_store
    from tasks.ppo.found import find_reinforced

    return find_reinforced(name, base, open_store(storage))


@task(
    task_run_name="ppo-{questions.short}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def reinforce_model(
    questions: PreparedQuestions, base: BaseCheckpoint, recipe: PpoRecipe, storage: str = ""
) -> ReinforcedModel:
    """Run verl's PPO as a Ray job; a job that an earlier try left running is followed."""
    import os

    from blocks.opening import open_store
    from tasks.ppo import run
    from tasks.ppo.report import model_markdown
    from tasks.prefect_ui import Progress, show_markdown
    from tasks.serve import handover

    store, progress = open_store(storage), Progress("ppo-progress", "PPO steps")
    room = lambda: handover.free_gpu(store.root)  # noqa: E731
    model = run.reinforce_model(questions, base, recipe, store, progress, os.environ, room)
    show_markdown("ppo", model_markdown(model), "What PPO made of the base")
    return model
