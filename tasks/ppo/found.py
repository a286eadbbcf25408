"""Find a model that PPO made: by its key, or as the newest.

Ring: edge (disk).
"""

from tasks.artifacts import ArtifactStore, ReinforcedModel
from tasks.errors import MissingError, SpecError

LATEST = "latest"


def find_reinforced(name: str, store: ArtifactStore) -> ReinforcedModel:
    """Return the model whose key begins with `name`; `latest`: the newest.

    Raises: MissingError that lists what there is, SpecError when several fit.
    """
    every = store.committed(ReinforcedModel)
    found = every[-1:] if name == LATEST else [model for model in every if name and model.key.startswith(name)]
    if not found:
        there = ", ".join(f"{model.short} ({model.origin})" for model in every) or "none"
        raise MissingError(
            f"no reinforced model {name!r} below {store.root}: there are {there}. Make one with "
            "`prefect deployment run reinforce-ppo/...`, or set TATARA_HOME"
        )
    if len(found) > 1:
        raise SpecError(f"{name!r} may be {', '.join(model.short for model in found)}: give more digits of the key")
    return found[0]
