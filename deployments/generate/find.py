"""Which model a name means: a folder, an artifact, a pretrain recipe, or a Hub id, looked for in that order.

Ring: edge (disk).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flows.recipes import PRETRAIN_RECIPES, resolve_every_pretrain
from tasks.artifacts import (
    LATEST,
    Artifact,
    ArtifactStore,
    BaseCheckpoint,
    MergedModel,
    PretrainedModel,
)
from tasks.errors import MissingError, SpecError
from tasks.pretrain.found import find_pretrained

_KINDS: tuple[type[Artifact], ...] = (PretrainedModel, MergedModel, BaseCheckpoint)
_MADE = (PretrainedModel, MergedModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where transformers finds the model: a folder's path, or a Hub id. `said`: what it is, for a person."""

    place: str
    said: str


def find_model(name: str, root: Path) -> Source:
    """Return the model of that name.

    Args:
        name: a folder, a Hub id, the first digits of an artifact's key, a pretrain recipe, or `latest`.
        root: the artifact store's (TATARA_HOME).
    Raises: MissingError that lists what exists, SpecError when several artifacts fit.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return Source(place=str(folder.resolve()), said=f"model {folder}")
    store = ArtifactStore(root)
    if name in PRETRAIN_RECIPES:
        return _of(find_pretrained(LATEST, name, resolve_every_pretrain(), store))
    if name == LATEST:
        made = [_newest(store, cls) for cls in _MADE]
        newest = max((pair for pair in made if pair), key=lambda pair: pair[0], default=None)
        if newest:
            return _of(newest[1])
    elif re.fullmatch(r"[0-9a-f]+", name):
        found = [model for cls in _KINDS for model in store.committed(cls) if model.key.startswith(name)]
        if len(found) > 1:
            fitting = ", ".join(f"{model.kind}/{model.short}" for model in found)
            raise SpecError(f"--model {name} may be {fitting}: give more digits of the key")
        if found:
            return _of(found[0])
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not folder.exists():
        return Source(place=name, said=f"model {name} of the Hub")
    raise MissingError(_say_missing(name, folder, store))


def _newest(store: ArtifactStore, cls: type[Artifact]) -> tuple[str, Artifact] | None:
    every = store.committed(cls)
    return ((store.manifest(cls, every[-1].key) or {}).get("created_at", ""), every[-1]) if every else None


def _of(model: Artifact) -> Source:
    folder = Path(getattr(model, "model_folder"))  # noqa: B009 - each of _KINDS has one
    if not (folder / "config.json").is_file():
        raise MissingError(f"{model.ref} says that its model is at {folder}, which is gone: run its flow again")
    return Source(place=str(folder), said=f"model {model.kind}/{model.short}: {folder}")


def _say_missing(name: str, folder: Path, store: ArtifactStore) -> str:
    why = f"{folder} has no config.json" if folder.is_dir() else "it is no folder, artifact, recipe or Hub id"
    there = [f"{model.kind}/{model.short}" for cls in _KINDS for model in store.committed(cls)]
    return (
        f"there is no model {name!r} ({why}). Artifacts below {store.root}: {', '.join(there) or 'none'}; pretrain "
        f"recipes: {', '.join(PRETRAIN_RECIPES)}; or give a folder, owner/name of the Hub, or `latest`"
    )
