"""Where artifacts are kept."""

from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import Field

if TYPE_CHECKING:
    from tasks.artifacts import ArtifactStore


class ArtifactStorage(Block):
    """The root folder of Tatara's artifacts on a machine, and the object store that several machines share."""

    _block_type_name = "Artifact Storage"
    _block_type_slug = "artifact-storage"

    root: str = Field(default=".tatara", description="Root folder: on this machine, or on a shared POSIX file system.")
    remote: str = Field(
        default="",
        description="fsspec URL (s3://bucket/prefix) that artifacts are sent to and come from; empty: TATARA_REMOTE.",
    )
    remote_options: SecretDict | None = Field(
        default=None,
        description="Options of its file system (s3fs: key, secret, endpoint_url); empty: the worker's AWS_ variables.",
    )

    def store(self) -> "ArtifactStore":
        """Open the store. Credentials leave the block only here."""
        from pathlib import Path

        from tasks.artifacts import ArtifactStore

        if not self.remote:
            return ArtifactStore.at(Path(self.root))
        from tasks.remote import Remote

        options = self.remote_options.get_secret_value() if self.remote_options else {}
        return ArtifactStore(Path(self.root), Remote(self.remote, options))
