"""The W&B Weave project that traces are delivered to."""

from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

if TYPE_CHECKING:
    from httpx import Client


class WeaveProject(Block):
    """A Weave project and the key that may write to it."""

    _block_type_name = "Weave Project"
    _block_type_slug = "weave-project"

    entity: str = Field(description="W&B user or team that owns the project.", pattern=r"^[\w.-]+$")
    project: str = Field(default="tatara", description="Project name; made on first use.", pattern=r"^[\w.-]+$")
    api_key: SecretStr = Field(description="W&B API key with write access to the project.")
    trace_server_url: str = Field(
        default="https://trace.wandb.ai", description="Weave trace server; a dedicated one has its own address."
    )

    @property
    def project_id(self) -> str:
        """`entity/project`, the way Weave names it."""
        return f"{self.entity}/{self.project}"

    def client(self) -> "Client":
        """Build an HTTP client for the trace server. The key leaves the block only here."""
        from httpx import Client

        return Client(base_url=self.trace_server_url, auth=("api", self.api_key.get_secret_value()))
