"""Where the gateway's traces wait: a Redis stream, or a JSONL file."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

if TYPE_CHECKING:
    from redis import Redis


class TraceQueue(Block):
    """The queue that the gateway fills and the flow ingest-traces drains."""

    _block_type_name = "Trace Queue"
    _block_type_slug = "trace-queue"

    file_path: str = Field(
        default="./llm_traces.jsonl", description="FILE_QUEUE_PATH of the gateway; with Redis, its local spool."
    )
    redis_url: SecretStr | None = Field(
        default=None, description="REDIS_URL of the gateway, with its password; empty: the file is the queue."
    )

    @property
    def path(self) -> Path:
        """The file as a Path."""
        return Path(self.file_path).expanduser()

    def client(self) -> "Redis | None":
        """Build a Redis client, or None for a file queue. The password leaves the block only here."""
        if self.redis_url is None or not self.redis_url.get_secret_value():
            return None
        from redis import Redis

        return Redis.from_url(self.redis_url.get_secret_value(), socket_timeout=10, socket_connect_timeout=5)
