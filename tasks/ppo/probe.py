"""What a node of a cluster has, asked from inside: this file's text is run there by the job's own Python.

    python -c <this text> '["/path", ...]' '["VARIABLE", ...]'  ->  one line, TATARA-PROBE [{...}, ...]

Ring: edge (runs on the cluster; needs Ray only, none of our modules).
"""

import json
import sys
from typing import Any

MARK = "TATARA-PROBE "


def look(paths: list[str], names: list[str]) -> dict[str, Any]:  # Any: JSON values
    """Return versions, and which paths and variables are not there."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        verl, error = version("verl"), ""
    except PackageNotFoundError:
        verl, error = "", f"verl is not installed for {sys.executable}"
    unseen = [path for path in paths if not os.path.exists(path)]  # noqa: PTH110 - sent to nodes as a closure
    lacking = [name for name in names if not os.environ.get(name)]
    found = {"python": platform.python_version(), "ray": version("ray"), "verl": verl}
    return {**found, "error": error, "unseen": unseen, "lacking": lacking}


def main(paths: list[str], names: list[str]) -> None:
    """Ask every living node and print what they say."""
    import ray  # type: ignore[import-not-found]  # it lives in another environment
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # type: ignore[import-not-found]

    ray.init(logging_level="ERROR", log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(paths, names)
        for node in nodes
    ]
    rows: list[dict[str, Any]] = []
    for node, reply in zip(nodes, asked, strict=True):
        try:
            said = ray.get(reply, timeout=120)
        except Exception as error:  # noqa: BLE001 - whatever a node can't do, it is told by name
            said = {"error": f"{type(error).__name__}: {str(error)[:300]}", "unseen": [], "lacking": []}
        rows.append({"address": node["NodeManagerAddress"], "resources": node["Resources"], **said})
    sys.stdout.write(MARK + json.dumps(rows) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
