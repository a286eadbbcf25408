"""Open a named block, or what the environment says when the name is empty.

A notebook, a test and a first run have no registered blocks: then TATARA_HOME and HF_TOKEN count.
"""

import os
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

if TYPE_CHECKING:
    from tasks.artifacts import ArtifactStore


def open_store(name: str) -> "ArtifactStore":
    """Return the store of the Artifact Storage block `name`; empty: TATARA_HOME."""
    from tasks.artifacts import ArtifactStore

    if not name:
        return ArtifactStore.default()
    from blocks.storage import ArtifactStorage

    block: Any = ArtifactStorage.load(name)  # Any: load() is typed as maybe a coroutine
    return block.store()


def open_hub(name: str) -> HfApi:
    """Return the client of the Hub Account block `name`; empty: HF_TOKEN, else anonymous."""
    if not name:
        return HfApi(token=os.environ.get("HF_TOKEN", "").strip() or False)  # a file's line end makes no header
    from blocks.hub import HubAccount

    block: Any = HubAccount.load(name)  # Any: load() is typed as maybe a coroutine
    return block.client()


def open_host(name: str) -> dict[str, str]:
    """Return the variables of the Serving Host block `name`; empty: none, the recipe and the environment count."""
    if not name:
        return {}
    from blocks.serving_host import ServingHost

    block: Any = ServingHost.load(name)  # Any: load() is typed as maybe a coroutine
    return block.client()
