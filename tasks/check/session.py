"""What a session of the notebook settles before long work: is a token needed, which GPU is this, which dtype.

A notebook's session may be cut and go on tomorrow on another kind of GPU. The dtype is part of an adapter's key, so it
is that of the first session, whose recipe is kept beside the artifacts: else the second one would begin anew.

Ring: edge (Hub, disk, nvidia-smi).
"""

import logging
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.check.base import find_origin
from tasks.errors import AccessError, CorruptError, SpecError
from tasks.fetch.run import pin_dataset
from tasks.hub import require_target
from tasks.specs import PretrainSpec, Recipe, change, validate
from tasks.train.run import say_slow_dtype

logger = logging.getLogger(__name__)


def why_token(recipe: Recipe, pretraining: PretrainSpec | None, hub: HfApi) -> str:
    """Say why a token is needed, or another one: what the recipe reads and publishes is asked of the Hub.

    "" when all of it is allowed: not after hours of training.  Raises: MissingError, TransientError.
    """
    publish = recipe.publish
    if publish.repo_id and not hub.token:
        return f"publishing to {publish.repo_id}"
    try:
        find_origin(recipe.base, pretraining, hub)
        pin_dataset(recipe.fetch, hub)
        if repo_id := publish.repo_id:
            doing = f"checking the Hub token for {repo_id}"
            require_target(hub, repo_id, doing, private=publish.private, create_pr=publish.create_pr)
    except AccessError as error:
        return str(error)
    return ""


def settle_dtype(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe in the dtype that its first session had, else in one that this machine's GPUs have.

    GPUs before Ampere (T4) only imitate bfloat16, many times slower: there float32 is taken, which is right and
    slow. A recipe that names float32 itself is left as it is. `folder` has the recipe.json of the last training that
    began; the caller writes it when this one begins, since a session that was refused settles nothing.
    """
    chosen = recipe
    if slow := say_slow_dtype(recipe.train):
        logger.warning("%s: done, unless this project began otherwise", slow)
        chosen = change(recipe, {"train": {"dtype": "float32"}})
    first = _first_dtype(recipe, folder) if recipe.train.dtype == "bfloat16" else ""
    kept = change(recipe, {"train": {"dtype": first or chosen.train.dtype}})
    if kept.train.dtype != chosen.train.dtype:
        logger.warning("this project began in %s on another GPU, and goes on in it", kept.train.dtype)
    return kept


def _first_dtype(recipe: Recipe, folder: Path) -> str:
    """Return the dtype of the recipe that was kept here when it trains what this one does but for it; else ""."""
    try:
        kept = validate(Recipe, files.read_json(folder / "recipe.json")["resolved"])
    except (FileNotFoundError, CorruptError, KeyError, TypeError, SpecError):
        return ""
    now = change(recipe, {"train": {"dtype": kept.train.dtype}})
    trained_by = ((each.base, each.fetch, each.pack, each.train) for each in (kept, now))
    first, second = ([spec.key_values() for spec in specs] for specs in trained_by)
    return kept.train.dtype if first == second else ""
