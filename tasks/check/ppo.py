"""Look at a PPO recipe before it runs: questions, base, and the cluster.

Ring: edge.
"""

import os

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore
from tasks.check.base import look_at_base
from tasks.check.run import check_free_disk, run_all
from tasks.ppo.prepare import pin_questions
from tasks.ppo.run import check_cluster
from tasks.specs import PpoRecipe


def check_ppo(recipe: PpoRecipe, store: ArtifactStore, hub: HfApi) -> list[str]:
    """Run every check that needs no download; returns and raises as check_recipe does."""
    return run_all(
        [
            lambda: f"questions: {recipe.questions.source} at {_pin(recipe, hub)[:12]}",
            lambda: f"base: {look_at_base(recipe.base, None, hub).origin}",
            lambda: check_cluster(recipe, os.environ),
            lambda: check_free_disk(store),
        ]
    )


def _pin(recipe: PpoRecipe, hub: HfApi) -> str:
    return next(iter(pin_questions(recipe.questions, hub).values()))
