"""Compare a folder with what a branch on the Hub holds: what has to be sent, what has to go.

    names and digests here + tree there -> plan_upload() -> UploadPlan; an empty one means: published already

Ring: pure.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

CARD = "README.md"
# Loaders pick these up by name: shards of an older model, adapter_config.json of an adapter, beside a new model.
LOADED_BY_NAME = ("*.safetensors", "*.safetensors.index.json", "*adapter_config.json", "config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One file of a tree on the Hub: size in bytes, and its sha256, or git's blob id where it is no LFS file."""

    size: int
    sha256: str
    blob_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPlan:
    """Paths to add or replace, and paths to delete, in one commit."""

    add: tuple[str, ...]
    delete: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the branch holds everything already, and nothing that must not be beside it."""
        return not self.add and not self.delete


def plan_upload(
    sizes: Mapping[str, int],
    there: Mapping[str, Stored],
    is_same: Callable[[str, Stored], bool],
) -> UploadPlan:
    """Return what makes the branch hold the files in `sizes`.

    Args:
        sizes: path -> bytes of each file to publish.
        there: path -> file of the branch.
        is_same: compares the content of a file here with one there; asked only where the sizes agree.
    """
    add = tuple(
        path
        for path, size in sorted(sizes.items())
        if path not in there or there[path].size != size or not is_same(path, there[path])
    )
    return UploadPlan(add=add, delete=tuple(stale_paths(sizes, there)))


def stale_paths(sent: Collection[str], there: Collection[str]) -> list[str]:
    """Return what another model left in the repo and a loader would take for a part of this one.

    >>> stale_paths({"model.safetensors"}, {"model.safetensors", "model-00002-of-00002.safetensors", "notes.md"})
    ['model-00002-of-00002.safetensors']
    """
    return sorted(
        path for path in there if path not in sent and any(fnmatchcase(path, pattern) for pattern in LOADED_BY_NAME)
    )
