"""Compare a cluster with what a run needs, and say all that is missing in one message.

Ring: pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import SpecError
from tasks.ray_cluster import require_resources
from tasks.specs import PpoSpec

RESOURCES = {"cuda": "GPU", "npu": "NPU", "cpu": "GPU"}  # verl counts GPUs (or NPUs) whatever the device is


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What one node told: its resources, and what the job's Python finds there. `error` is why it could not tell."""

    address: str
    resources: Mapping[str, float]
    python: str = ""
    ray: str = ""
    verl: str = ""
    unseen: tuple[str, ...] = ()  # paths that are not there
    lacking: tuple[str, ...] = ()  # variables that are not set
    error: str = ""


def check_resources(nodes: Sequence[Mapping[str, float]], spec: PpoSpec, url: str) -> str:
    """Return a line on a cluster that is large enough. Raises CapacityError with what is missing.

    >>> check_resources([{"CPU": 8, "GPU": 8}], PpoSpec(nnodes=1), "http://h:8265")
    'cluster: 1 node at http://h:8265, 1 with 8 GPU or more'
    """
    wanted = {RESOURCES[spec.device]: spec.n_gpus_per_node}
    return require_resources(nodes, spec.nnodes, wanted, url, "lower PpoSpec.nnodes and n_gpus_per_node")


def check_nodes(nodes: Sequence[NodeFacts], url: str) -> str:
    """Return a line on nodes that can run verl. Raises SpecError with every fault of every node."""
    faults: list[str] = []
    for node in nodes:
        if node.error:
            faults.append(f"{node.address}: {node.error}")
        if node.unseen:
            faults.append(f"{node.address} does not see {', '.join(node.unseen)}: put TATARA_HOME on shared storage")
        if node.lacking:
            faults.append(f"{node.address} has no {', '.join(node.lacking)} set: set it there before `ray start`")
    for what in ("python", "ray", "verl"):
        versions = {str(getattr(node, what)) for node in nodes if not node.error}
        if len(versions) > 1:
            faults.append(f"the nodes have different versions of {what}: {', '.join(sorted(versions))}")
    if faults:
        raise SpecError(f"the cluster at {url} can't run verl: {' | '.join(faults)}")
    first = nodes[0]
    return f"nodes: {len(nodes)} with Python {first.python}, Ray {first.ray}, verl {first.verl}; all see the files"


def read_facts(rows: Sequence[dict[str, Any]]) -> list[NodeFacts]:  # Any: JSON values
    """Return what the probe printed."""
    return [NodeFacts(**{**row, "unseen": tuple(row["unseen"]), "lacking": tuple(row["lacking"])}) for row in rows]
