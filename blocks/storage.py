"""Where artifacts are kept."""

from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from pydantic import Field

if TYPE_CHECKING:
    from tasks.artifacts import ArtifactStore


class ArtifactStorage(Block):
    """The root folder of Tatara's artifacts on this machine or on a shared file system."""

    _block_type_name = "Artifact Storage"
    _block_type_slug = "artifact-storage"

    root: str = Field(default=".tatara", description="Root folder; a shared POSIX file system for several machines.")

    def store(self) -> "ArtifactStore":
        """Open the store."""
        from pathlib import Path

        from tasks.artifacts import ArtifactStore

        return ArtifactStore(Path(self.root))
