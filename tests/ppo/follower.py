"""A process that runs a job as the flow does, and is told to end as Prefect tells it: SIGTERM becomes an exception."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

from tasks.ppo.cluster import Cluster
from tasks.ppo.run import run_job
from tasks.ray_jobs import RayJobs
from tasks.specs import BaseModelSpec, PpoRecipe, RaySpec

url, key, command, folder = sys.argv[1:]
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("httpx").setLevel(logging.WARNING)


def end(number, frame):
    raise SystemExit(143)


signal.signal(signal.SIGTERM, end)
recipe = PpoRecipe(base=BaseModelSpec(model="x"), ray=RaySpec(address=url, poll_s=0.2, health_s=1, lost_after_s=60))
told = Path(folder) / "told.jsonl"


def tell(line, attempt):
    with told.open("a") as handle:
        handle.write(json.dumps([attempt, line]) + "\n")


run_job(
    Cluster(jobs=RayJobs(url, os.environ), python="python", is_ours=False), key, command, recipe, Path(folder), tell
)
sys.stdout.write("THROUGH\n")
