"""How long a person waits before anything happens: importing a flow, the gateway's first answer.

python tests/bench/bench_start.py        one JSON line each: median and best of five, spread, and Prefect's own share
"""

import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 5


def timed_import(module: str) -> float:
    """Seconds that a fresh interpreter spends in `import module`."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True).stdout)


def first_answer() -> float:
    """Seconds from the start of the gateway's process to its first /health."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "LITE_GATEWAY_PORT": str(port), "FILE_QUEUE_PATH": f"/tmp/bench-traces-{port}.jsonl"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.gateway"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - start < 30:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                return time.perf_counter() - start
            except OSError:
                time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    raise TimeoutError("the gateway did not answer in 30 s")


def report(name: str, values: list[float], **more: float) -> None:
    """Print one JSON line; the first value warmed up."""
    timed = values[1:]
    median = statistics.median(timed)
    spread = round(100 * (max(timed) - min(timed)) / median, 1)
    line = {"name": name, "machine": platform.machine(), "median_s": round(median, 3), "best_s": round(min(timed), 3)}
    line |= {"spread_pct": spread, **more}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    prefect = [timed_import("prefect") for _ in range(REPEATS + 1)]
    flows = [timed_import("flows.finetune") for _ in range(REPEATS + 1)]
    alone = {"prefect_alone_s": round(statistics.median(prefect[1:]), 3), "prefect_best_s": round(min(prefect[1:]), 3)}
    report("import-flows-finetune", flows, **alone)
    report("gateway-first-answer", [first_answer() for _ in range(REPEATS + 1)])
