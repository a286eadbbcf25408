"""Register every block type with the Prefect server: `tatara blocks`."""

from prefect.blocks.core import Block

from blocks.hub import HubAccount
from blocks.serving_host import ServingHost
from blocks.storage import ArtifactStorage
from blocks.trace_queue import TraceQueue
from blocks.weave_project import WeaveProject

TYPES: tuple[type[Block], ...] = (HubAccount, WeaveProject, TraceQueue, ServingHost, ArtifactStorage)


def register() -> list[str]:
    """Register all types; return their names. Saved blocks keep their values."""
    for block in TYPES:
        block.register_type_and_schema()
    return [block.get_block_type_slug() for block in TYPES]
