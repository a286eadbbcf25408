"""Find a model that PPO made: by its key, or as the newest of a recipe's base.

Ring: edge (disk).
"""

from tasks.artifacts import LATEST, ArtifactStore, ReinforcedModel
from tasks.errors import MissingError, SpecError
from tasks.models import is_origin_of
from tasks.specs import BaseModelSpec


def find_reinforced(name: str, base: BaseModelSpec, store: ArtifactStore) -> ReinforcedModel:
    """Return the model whose key begins with `name`; `latest`: the newest that was made of this base.

    Raises: MissingError that lists what there is, SpecError when several fit or it was made of another base.
    """
    found = store.choose(ReinforcedModel, name, lambda model: is_origin_of(base, _base_origin(model)))
    if found is None:
        there = ", ".join(f"{model.short} ({model.origin})" for model in store.known(ReinforcedModel)) or "none"
        wanted = f"of {base.model}" if name == LATEST else repr(name)
        raise MissingError(
            f"no reinforced model {wanted} below {store.root}: there are {there}. Make one with "
            "`prefect deployment run reinforce-ppo/...`, or set TATARA_HOME"
        )
    if not is_origin_of(base, _base_origin(found)):
        raise SpecError(
            f"model {found.short} was made of {_base_origin(found)}, not of {base.model}, the recipe's base, whose "
            "knobs would publish, serve and verify it: name the recipe of that base, or set changes.base.model to it"
        )
    return found


def _base_origin(model: ReinforcedModel) -> str:
    """Return what the model itself says of its base, whose artifact may be cleared away."""
    return model.origin.partition(" of ")[2]
