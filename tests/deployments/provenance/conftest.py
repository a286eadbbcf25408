"""The Weave-like server and the redis-server of the trace tests."""

from tests.tasks.traces.conftest import redis_port, weave

__all__ = ["redis_port", "weave"]
