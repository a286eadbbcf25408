"""Find a model that was pretrained here: by its key, or as the newest of a recipe.

A model belongs to a recipe when its knobs are the recipe's own, or those that a run of this store changed it to
(runs/<flow run>/recipe.json).

Ring: edge (disk).
"""

from collections.abc import Iterator, Mapping
from typing import Any  # of key_values(): JSON values

from tasks import files
from tasks.artifacts import LATEST, ArtifactStore, PretrainedModel
from tasks.errors import CorruptError, MissingError, SpecError
from tasks.specs import PretrainSpec, validate


def find_pretrained(name: str, recipe: str, specs: Mapping[str, PretrainSpec], store: ArtifactStore) -> PretrainedModel:
    """Return the pretrained model whose key begins with `name`; `latest`: the newest of the recipe.

    Args:
        name: first digits of a key, or `latest`.
        recipe: the recipe's name.
        specs: what every recipe resolves to today, by its name.
        store: where the models and the runs are.
    Raises: MissingError that lists what there is, SpecError when several fit or it is another recipe's.
    """
    questions = _questions(recipe, specs, store)
    found = store.choose(PretrainedModel, name, lambda model: _is_of(model, questions, store))
    if found is None:
        every = store.known(PretrainedModel)
        there = ", ".join(f"{model.short} ({model.num_parameters:,} parameters)" for model in every) or "none"
        wanted = f"of the recipe {recipe}" if name == LATEST else repr(name)
        raise MissingError(
            f"no pretrained model {wanted} below {store.root}: there are {there}. Make one with "
            f"`prefect deployment run pretrain/...`, recipe {recipe}, or set TATARA_HOME"
        )
    owners = [each for each in specs if _is_of(found, _questions(each, specs, store), store)]
    if owners and recipe not in owners:
        raise SpecError(
            f"model {found.short} was made by the recipe {owners[0]}, not by {recipe}, whose knobs would serve and "
            f"verify it: set recipe to {owners[0]}"
        )
    return found


def _questions(recipe: str, specs: Mapping[str, PretrainSpec], store: ArtifactStore) -> list[dict[str, Any]]:
    return [specs[recipe].key_values(), *(asked.key_values() for asked in _asked(recipe, store))]


def _is_of(model: PretrainedModel, questions: list[dict[str, Any]], store: ArtifactStore) -> bool:
    try:
        manifest = store.record(PretrainedModel, model.key) or {}
        return validate(PretrainSpec, manifest.get("spec", {})).key_values() in questions
    except SpecError:  # another version's knobs
        return False


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
