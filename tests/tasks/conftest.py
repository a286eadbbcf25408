"""What several rooms of tests/tasks ask: a stand-in of Ray's dashboard."""

from collections.abc import Iterator

import pytest

from tests.ports import free_port
from tests.ray_dashboard import Dashboard


@pytest.fixture
def ray() -> Iterator[Dashboard]:
    """A dashboard on loopback that fails as networks do."""
    made = Dashboard(free_port())
    yield made
    made.server.shutdown()
    made.server.server_close()
