"""A stand-in for Ray: its actors are objects of the driver's own process, and one dies when a test says so.

RAY_FAULT="1 poll 3 OutOfMemoryError": the third call of `poll` on actor 1 raises that, and whatever is asked after it.
"""

import os
import sys
from types import ModuleType, SimpleNamespace


class RayError(Exception):
    pass


_SAID = {
    "ActorDiedError": "The actor died unexpectedly before finishing this task.\n\tclass_name: Node",
    "OutOfMemoryError": "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.2)",
    "RuntimeEnvSetupError": "Failed to set up runtime environment.",
    "ActorUnschedulableError": "The actor is not schedulable: its placement group was removed.",
}
RayActorError = type("RayActorError", (RayError,), {})
_KINDS = {name: type(name, (RayActorError if name == "ActorDiedError" else RayError,), {}) for name in _SAID}
exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, **_KINDS)
_actors = []


class _Actor:
    def __init__(self, made):
        self.number, self.made, self.calls, self.error = len(_actors), made, {}, None
        _actors.append(self)

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: self._call(name, *args))

    def _call(self, name, *args):
        self.calls[name] = self.calls.get(name, 0) + 1
        number, method, count, kind = os.environ.get("RAY_FAULT", "-1 - 0 -").split()
        if (self.number, name, self.calls[name]) == (int(number), method, int(count)):
            self.error = _KINDS[kind](_SAID[kind])
        util.get_node_ip_address = lambda: f"10.0.0.{self.number + 1}"
        return self.error or getattr(self.made, name)(*args)


def remote(kind):
    made = SimpleNamespace(remote=lambda *args: _Actor(kind(*args)))
    return SimpleNamespace(options=lambda **options: made)


def get(answer):
    found = answer if isinstance(answer, list) else [answer]
    for one in found:
        if isinstance(one, RayError):
            raise one
    return answer


def init(**options):
    pass


def wait(refs, timeout):
    return refs, []


def _module(name, **values):
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(values)
    return module


util = _module("ray.util")
_module("ray.util.placement_group", placement_group=lambda *args, **more: SimpleNamespace(ready=lambda: None))
_module("ray.util.scheduling_strategies", PlacementGroupSchedulingStrategy=lambda *args, **more: None)
