"""What a session of the notebook settles before long work: is a token needed, which GPU is this, which dtype.

A notebook's session may be cut and go on tomorrow on another kind of GPU. The dtype is part of an adapter's key, so it
is chosen once, for the first session, and kept beside the artifacts: else the second one would begin anew.

Ring: edge (Hub, disk, nvidia-smi).
"""

import logging
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.check.base import find_origin
from tasks.check.run import keep_recipe
from tasks.errors import AccessError, CorruptError
from tasks.fetch.run import pin_dataset
from tasks.specs import PretrainSpec, Recipe, change
from tasks.train.run import say_slow_dtype

logger = logging.getLogger(__name__)


def why_token(recipe: Recipe, pretraining: PretrainSpec | None, hub: HfApi) -> str:
    """Say why a token is needed, "" when none is or there is one. Raises MissingError, TransientError."""
    if hub.token:
        return ""
    if recipe.publish.repo_id:
        return f"publishing to {recipe.publish.repo_id}"
    try:
        find_origin(recipe.base, pretraining, hub)
        pin_dataset(recipe.fetch, hub)
    except AccessError as error:
        return str(error)
    return ""


def settle_dtype(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe in the dtype that its first session had, else in one that this machine's GPUs have.

    GPUs before Ampere (T4, V100) only imitate bfloat16, many times slower: there float32 is taken, which is right and
    slow. `folder` gets recipe.json.
    """
    chosen = recipe
    if slow := say_slow_dtype(recipe.train):
        logger.warning("%s: done, unless this project began otherwise", slow)
        chosen = change(recipe, {"train": {"dtype": "float32"}})
    kept = change(recipe, {"train": {"dtype": _first_dtype(recipe, folder) or chosen.train.dtype}})
    if kept.train.dtype != chosen.train.dtype:
        logger.warning("this project began in %s on another GPU, and goes on in it", kept.train.dtype)
    keep_recipe("notebook", kept, folder)
    return kept


def _first_dtype(recipe: Recipe, folder: Path) -> str:
    """Return the dtype of the recipe that was kept here when that is this one but for it; else ""."""
    try:
        resolved = files.read_json(folder / "recipe.json")["resolved"]
        dtype = str(resolved["train"]["dtype"])
        return dtype if change(recipe, {"train": {"dtype": dtype}}).model_dump(mode="json") == resolved else ""
    except (FileNotFoundError, CorruptError, KeyError, TypeError, ValueError):
        return ""
