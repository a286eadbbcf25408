"""Find a model that was pretrained here: by its key, or as the newest of a recipe.

A model belongs to a recipe when its knobs are the recipe's own, or those that a run of this store changed it to
(runs/<flow run>/recipe.json).

Ring: edge (disk).
"""

from collections.abc import Iterator

from tasks import files
from tasks.artifacts import ArtifactStore, PretrainedModel
from tasks.errors import CorruptError, MissingError, SpecError
from tasks.specs import PretrainSpec, validate

LATEST = "latest"


def find_pretrained(name: str, recipe: str, spec: PretrainSpec, store: ArtifactStore) -> PretrainedModel:
    """Return the pretrained model whose key begins with `name`; `latest`: the newest of the recipe.

    Args:
        name: first digits of a key, or `latest`.
        recipe: the recipe's name.
        spec: what it resolves to today.
        store: where the models and the runs are.
    Raises: MissingError that lists what there is, SpecError when several fit.
    """
    every = store.committed(PretrainedModel)
    found = newest_of(recipe, spec, store) if name == LATEST else [m for m in every if name and m.key.startswith(name)]
    if not found:
        there = ", ".join(f"{model.short} ({model.num_parameters:,} parameters)" for model in every) or "none"
        wanted = f"of the recipe {recipe}" if name == LATEST else repr(name)
        raise MissingError(
            f"no pretrained model {wanted} below {store.root}: there are {there}. Make one with "
            f"`prefect deployment run pretrain/...`, recipe {recipe}, or set TATARA_HOME"
        )
    if len(found) > 1:
        raise SpecError(f"{name!r} may be {', '.join(model.short for model in found)}: give more digits of the key")
    return found[0]


def newest_of(recipe: str, spec: PretrainSpec, store: ArtifactStore) -> list[PretrainedModel]:
    """Return the newest model of a recipe, in a list that is empty without one."""
    questions = [spec.key_values(), *(asked.key_values() for asked in _asked(recipe, store))]
    for model in reversed(store.committed(PretrainedModel)):
        values = (store.manifest(PretrainedModel, model.key) or {}).get("spec", {})
        try:
            if validate(PretrainSpec, values).key_values() in questions:
                return [model]
        except SpecError:  # another version's knobs
            continue
    return []


def _asked(recipe: str, store: ArtifactStore) -> Iterator[PretrainSpec]:
    """Yield what runs of this store made of the recipe: `pretrain` under its name, `finetune` as pretrain:<name>."""
    for path in sorted((store.root / "runs").glob("*/recipe.json")):
        try:
            kept = files.read_json(path)
            resolved = kept["resolved"]
            if kept["recipe"] == recipe and "shape" in resolved:
                yield validate(PretrainSpec, resolved)
            elif resolved.get("base", {}).get("model") == f"pretrain:{recipe}":
                yield validate(PretrainSpec, kept["pretraining"])
        except (CorruptError, OSError, KeyError, TypeError, AttributeError, SpecError):
            continue
