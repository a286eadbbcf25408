"""Flow runs that nobody runs any more: their worker was killed, and Prefect still calls them Running.

    worker and its flows gone -> Running at the server -> Crashed, and the place of the next run is free
                                                          a promotion is rolled back: its hooks died with the worker

Without this the next `finetune` waits for minutes without a word: the killed run keeps its deployment's
one place until its lease ends.

Ring: edge (Prefect's API, processes).
"""

import logging
from pathlib import Path
from typing import Any

from deployments import orchestration
from tasks import processes
from tasks.serve import handover, promotion

_HELD = ["RUNNING", "CANCELLING", "PENDING"]
logger = logging.getLogger(__name__)


def settle_lost_runs(prefect: "orchestration.Prefect", pool: str) -> list[str]:
    """Mark the runs of our pool as crashed when neither our worker nor a flow of its is alive; return their names.

    Only on a server of our own, whose pool has no worker but ours.
    """
    identity_file = prefect.identity("worker")
    if not prefect.is_ours or processes.find_members(identity_file, processes.find_alive(identity_file)):
        return []
    wanted = {"work_pools": {"name": {"any_": [pool]}}, "flow_runs": {"state": {"type": {"any_": _HELD}}}}
    lost = orchestration.call(prefect, "/flow_runs/filter", wanted) or []
    state = {"type": "CRASHED", "name": "Crashed", "message": "the worker was killed; the next run goes on from here"}
    for run in lost:
        orchestration.call(prefect, f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        logger.warning("flow run %s was lost when its worker was killed: marked as crashed", run["name"])
        _roll_back(prefect.home.parent, run)
    return [str(run["name"]) for run in lost]


def _roll_back(home: Path, run: dict[str, Any]) -> None:  # Any: JSON values
    """End what a lost promotion left: a model on trial before clients, or one beside the old that holds its memory."""
    if str(run["name"]).startswith("promote-") and not (run.get("parameters") or {}).get("storage"):
        said = handover.go_back(home, str(run["id"])) or promotion.roll_back(home, str(run["id"]))
        logger.warning("%s: %s", run["name"], said)
