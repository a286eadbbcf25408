"""Which Ray cluster is meant, and whether it is large enough.

    address or RAY_ADDRESS -> find_dashboard() -> RayJobs(url).nodes() -> require_resources()

Ring: pure.
"""

from collections.abc import Mapping, Sequence

from tasks.errors import CapacityError, MissingError


def find_dashboard(address: str, variables: Mapping[str, str], field: str, otherwise: str = "") -> str:
    """Return the URL of a cluster's dashboard. Raises MissingError when none is named, or not by that URL.

    >>> find_dashboard("", {"RAY_ADDRESS": "http://head:8265"}, "TrainSpec.launch.ray_address")
    'http://head:8265'
    """
    address = address or variables.get("RAY_ADDRESS", "")
    if not address:
        raise MissingError(
            f"no Ray cluster is named: set {field} or RAY_ADDRESS to its dashboard's URL (http://head:8265){otherwise}"
        )
    if not address.startswith(("http://", "https://")):  # `ray start` prints another port
        raise MissingError(
            f"RAY_ADDRESS is {address}, expected the URL of the dashboard, such as http://{address.split(':')[0]}:8265"
        )
    return address.rstrip("/")


def require_resources(
    nodes: Sequence[Mapping[str, float]], count: int, wanted: Mapping[str, float], url: str, way_out: str
) -> str:
    """Return a line on a cluster of which `count` nodes have all that is wanted. Raises CapacityError: what is missing.

    >>> require_resources([{"CPU": 8, "GPU": 8}], 1, {"GPU": 8}, "http://h:8265", "lower it")
    'cluster: 1 node at http://h:8265, 1 with 8 GPU or more'
    """
    fitting = sum(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes)
    said, each = f"{len(nodes)} node{'s' * (len(nodes) != 1)}", say_resources(wanted)
    if fitting >= count:
        return f"cluster: {said} at {url}, {fitting} with {each} or more"
    have = "; ".join(f"one with {say_resources(_shown(node, wanted))}" for node in nodes) or "none"
    raise CapacityError(
        f"the run needs {count} node{'s' * (count != 1)} with {each} each, but the cluster at {url} has {said}: "
        f"{have}. Start Ray on {count - fitting} more nodes of {each}, or {way_out}"
    )


def say_resources(resources: Mapping[str, float]) -> str:
    """Write them in words.

    >>> say_resources({"GPU": 8.0, "CPU": 64})
    '8 GPU, 64 CPU'
    """
    return ", ".join(f"{value:g} {name}" for name, value in resources.items())


def _shown(node: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    return {name: node.get(name, 0.0) for name in {**wanted, "CPU": 0}}
