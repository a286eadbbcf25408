"""Look at a PPO recipe before it runs: questions, base, cluster, and what comes after the model.

Ring: edge.
"""

import os
from collections.abc import Callable, Mapping

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PreparedQuestions
from tasks.check.base import BaseFacts, look_at_base
from tasks.check.run import late_checks, require_whole, run_all
from tasks.errors import SpecError
from tasks.fetch.run import base_key, pin_base
from tasks.ppo.preflight import check_cluster, find_begun
from tasks.ppo.prepare import pin_questions, questions_key
from tasks.serve.settings import NO_OVERRIDES
from tasks.specs import PpoRecipe


def check_ppo(recipe: PpoRecipe, store: ArtifactStore, hub: HfApi, host: Mapping[str, str] = NO_OVERRIDES) -> list[str]:
    """Run every check that needs no download; returns and raises as check_recipe does.

    What is served is looked at only when the run goes that far. Before a cluster is asked for, a model that is whole
    and a job that runs are looked for: neither needs one.
    """
    pins: dict[str, str] = {}
    facts: list[BaseFacts] = []  # empty when the base can't be looked at: then that is the fault to say

    def ask() -> str:
        pins.update(pin_questions(recipe.questions, hub))
        return f"questions: {recipe.questions.source} at {next(iter(pins.values()))[:12]}"

    def look() -> str:
        facts.append(look_at_base(recipe.base, None, hub))
        return f"base: {facts[0].origin}"

    checks: list[Callable[[], str]] = [
        ask,
        look,
        lambda: _find_begun(recipe, pins, facts, store, hub) or check_cluster(recipe, os.environ),
        lambda: require_whole(recipe.publish),
        lambda: _check_lengths(recipe, facts) if recipe.until == "verify" else "",
        *late_checks(recipe, store, hub, host),
    ]
    return run_all(checks)


def _find_begun(
    recipe: PpoRecipe, pins: dict[str, str], facts: list[BaseFacts], store: ArtifactStore, hub: HfApi
) -> str:
    if not pins or not facts:
        return ""
    questions = store.find(PreparedQuestions, questions_key(recipe.questions, pins))
    base = store.find(BaseCheckpoint, base_key(recipe.base, pin_base(recipe.base, hub)))
    return find_begun(recipe, questions, base, store, os.environ)


def _check_lengths(recipe: PpoRecipe, facts: list[BaseFacts]) -> str:
    """The server must take what verify asks: a question with its answer, and one token more."""
    longest, ppo = recipe.serve.max_model_len, recipe.ppo
    needed = ppo.max_prompt_length + max(ppo.max_response_length, recipe.verify.greedy_tokens) + 1
    if longest < needed:
        raise SpecError(
            f"ServeSpec.max_model_len = {longest}, but verify asks for questions of {ppo.max_prompt_length} tokens "
            f"(PpoSpec.max_prompt_length) with their answers: expected at least {needed}"
        )
    context = facts[0].context_tokens if facts else 0
    if context and longest > context:
        raise SpecError(f"ServeSpec.max_model_len = {longest} but the base's context is {context}: lower it")
    return ""
