"""What an object store says of an artifact: read as from a stranger, since whoever writes there may write anything.

    manifest.json of a remote -> parse_manifest() -> fields that fit their place, names that stay in their folder

Ring: pure.  Units: bytes.
"""

import json
from collections.abc import Container
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]  # Any: JSON values
MANIFEST = "manifest.json"
NOTE = "remote.json"  # in an artifact's folder: where it was sent to or came from
_OURS = ("root", "digests", "aside")  # what a remote's manifest has beyond that of the artifact's folder


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    key: str
    model_folder: str = ""


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    kind: str
    artifact: _Fields
    created_at: str
    files: dict[str, Annotated[int, Field(ge=0)]]
    root: str
    digests: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    aside: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def parse_manifest(place: str, data: bytes) -> Json:
    """Return the manifest that lies at `kind/key[:16]`.

    Raises: ValueError when it is torn, another place's, or names a file that would lie outside the artifact's folder.

    >>> parse_manifest("adapter/ab", b"[]")
    Traceback (most recent call last):
        ...
    ValueError: it has no artifact
    """
    manifest = json.loads(data)
    if not isinstance(manifest, dict) or "artifact" not in manifest:
        raise ValueError("it has no artifact")
    found = _Manifest.model_validate(manifest)
    if place != f"{found.kind}/{found.artifact.key[:16]}":
        raise ValueError(f"it is that of {found.kind}/{found.artifact.key[:16]}")
    if found.files.keys() != found.digests.keys():
        raise ValueError("its files are not those that it has digests of")
    if wrong := [name for name in found.files if not _stays_below(name, found.files.keys())]:
        raise ValueError(f"a file of an artifact can't be called {wrong[0]!r}")
    return manifest


def _stays_below(name: str, names: Container[str]) -> bool:
    """Say whether a file of this name lies in its folder, beside and not below the others, and is none of ours."""
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_plain and name not in (".", MANIFEST, NOTE) and not any(str(above) in names for above in path.parents)


def without_ours(manifest: Json) -> Json:
    """Return a remote's manifest as it is written into the artifact's folder."""
    return {name: value for name, value in manifest.items() if name not in _OURS}


def relocate(artifact: Json, root: str, here: str) -> Json:
    """Return an artifact's fields with the paths below `root` told below `here`.

    >>> relocate({"model_folder": "/a/base/0/model", "origin": "/abc", "num_steps": 3}, "/a", "/b")
    {'model_folder': '/b/base/0/model', 'origin': '/abc', 'num_steps': 3}
    """
    return {
        name: f"{here}/{value[len(root) + 1 :]}" if isinstance(value, str) and value.startswith(f"{root}/") else value
        for name, value in artifact.items()
    }
