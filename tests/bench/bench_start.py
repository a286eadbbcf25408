"""How long a person waits before anything happens: importing a flow, the gateway's first answer.

python tests/bench/bench_start.py        one JSON line each: median and best of nine (the gateway: five), spread

Imports also tell their CPU time, which says more on a shared machine, and what Prefect alone takes, measured in turns.
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
IMPORTS = 9


def timed_import(statement: str) -> tuple[float, float]:
    """Seconds by the clock and of CPU that a fresh interpreter spends in an import statement."""
    code = (
        f"import time; c, t = time.process_time(), time.perf_counter(); {statement}; "
        "print(time.perf_counter() - t, time.process_time() - c)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


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


def report_imports() -> None:
    """Import the line and Prefect alone in turns; print one JSON line, CPU seconds in it."""
    statements = ("import flows.finetune", "import prefect", "from prefect import flow, task")
    rounds = [[timed_import(statement) for statement in statements] for _ in range(IMPORTS + 1)]
    ours, prefect, decorators = (list(zip(*taken, strict=True)) for taken in zip(*rounds[1:], strict=True))
    more = {"best_cpu_s": min(ours[1]), "median_cpu_s": statistics.median(ours[1])}
    for name, (wall, cpu) in {"prefect": prefect, "flow_task": decorators}.items():
        more |= {f"{name}_best_s": min(wall), f"{name}_alone_s": statistics.median(wall)}
        more |= {f"{name}_best_cpu_s": min(cpu), f"{name}_median_cpu_s": statistics.median(cpu)}
    walls = [taken[0][0] for taken in rounds]
    report("import-flows-finetune", walls, **{name: round(value, 3) for name, value in more.items()})


if __name__ == "__main__":
    report_imports()
    report("gateway-first-answer", [first_answer() for _ in range(REPEATS + 1)])
