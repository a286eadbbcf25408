"""What the gateway costs: CPU and added latency per request, delay of streamed chunks, memory over time.

    python tests/bench/bench_gateway.py [--seconds 3] [--rounds 3] [--soak 0] [--peer NAME=COMMAND ...]

    load generator (a process) -> gateway or peer -> mock upstream (a process)
                               -> mock upstream                                 "direct": what to subtract

Prints one JSON line; --write-baseline puts it into tests/bench/baselines/gateway_<machine>.json. `--soak 600` loads
the gateway alone, so long, from 64 connections, and says what memory it took, beside what a run without it measured.
A peer's COMMAND is an executable with its arguments that serves POST /v1/chat/completions; `{port}` and `{upstream}` in
it are replaced. CPU is that of the process and its children, from /proc/PID/stat; trace recording of the
gateway is on.

Units: `_us`, `_ms`, `_s`. The machine should be idle: `spread_pct` says how far the rounds lie apart.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOAD = Path(__file__).with_name("gateway_load.py")
PROBE = {"model": "mock", "messages": [{"role": "user", "content": "x"}]}
CONNECTIONS = (1, 16, 64, 256)
SSE_PER_S = 128
SOAK_CONNECTIONS = 64


def in_process(*arguments):
    """Run one load in a process of its own."""
    argv = [sys.executable, str(LOAD), *map(str, arguments)]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)


class Proxy:
    """The gateway, a peer, or nothing at all ("direct"), in front of the mock."""

    def __init__(self, name, command, upstream, folder):
        self.name, self.process, self.port = name, None, upstream
        if command is None:
            return
        self.port = free_port()
        url = f"http://127.0.0.1:{upstream}"
        argv = [part.replace("{port}", str(self.port)).replace("{upstream}", url) for part in shlex.split(command)]
        own = {"VLLM_URL": url, "LITE_GATEWAY_PORT": str(self.port), "FILE_QUEUE_PATH": str(folder / "traces.jsonl")}
        own |= {"GATEWAY_MAX_CONCURRENT": "1024"} if name == "gateway" else {}
        with (folder / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=os.environ | own, cwd=ROOT if name == "gateway" else folder, stdout=log, stderr=log
            )
        wait_for(self.port)

    def pids(self):
        """The process and all its descendants."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += map(int, children.read_text().split())
        return found

    def cpu_s(self):
        ticks = 0
        for pid in self.pids() if self.process else ():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss_mb(self):
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids())
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, limit_s=120):
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            data = json.dumps(PROBE).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data)
            request.add_header("content-type", "application/json")
            if b"choices" in urllib.request.urlopen(request, timeout=5).read():
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"nothing answers on port {port} after {limit_s} s: see its log")


def measure(proxy, seconds, rounds, warm_s):
    """Return per number of connections the median of the rounds, and the streams."""
    in_process("whole", proxy.port, 16, warm_s)
    result = {}
    for connections in CONNECTIONS:
        result[str(connections)] = median([load_once(proxy, "whole", connections, seconds) for _ in range(rounds)])
    streams = median([load_once(proxy, "streams", SSE_PER_S, seconds) for _ in range(rounds)])
    return result | {"sse": streams}


def load_once(proxy, what, number, seconds):
    cpu_s = proxy.cpu_s()
    load = in_process(what, proxy.port, number, seconds)
    count, wall_s = load.pop("count"), load.pop("wall_s")
    return load | {"per_s": round(count / wall_s), "cpu_us": round((proxy.cpu_s() - cpu_s) / count * 1e6)}


def soak(seconds, folder):
    """Load the gateway from 64 connections; return its memory over time, the first tenth left out of the slope.

    The trace file is what a drain would have taken away: sealed segments are removed now and then.
    """
    upstream = free_port()
    mock = subprocess.Popen([sys.executable, str(LOAD), "mock", str(upstream)])
    samples, load = [], None
    try:
        wait_for(upstream)
        proxy = Proxy("gateway", f"{shlex.quote(sys.executable)} -m deployments.gateway", upstream, folder)
        try:
            argv = [sys.executable, str(LOAD), "whole", str(proxy.port), str(SOAK_CONNECTIONS), str(seconds)]
            load, begin = subprocess.Popen(argv, stdout=subprocess.PIPE), time.monotonic()
            while load.poll() is None:
                samples.append((round(time.monotonic() - begin), proxy.rss_mb()))
                for segment in folder.glob("traces.jsonl.0*"):
                    segment.unlink()
                time.sleep(min(5.0, seconds / 20))
            count = json.loads(load.stdout.read())["count"]
        finally:
            proxy.stop()
    finally:
        mock.kill()
    late = [(at, size) for at, size in samples if seconds / 10 <= at <= seconds]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    sizes = [size for _, size in late]
    return {
        "connections": SOAK_CONNECTIONS,
        "seconds": seconds,
        "requests": count,
        "rss_mb": {"first": samples[0][1], "least": min(sizes), "most": max(sizes), "last": sizes[-1]},
        "slope_mb_per_hour": round(slope * 3600, 2),
        "every_minute_mb": [size for at, size in samples[:: max(1, len(samples) // 11)]],
    }


def median(runs):
    """The median of each number, and how far the CPU figures lie apart."""
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    cpus = [run["cpu_us"] for run in runs]
    return middle | {"spread_pct": round(100 * (max(cpus) - min(cpus)) / max(1, middle["cpu_us"]), 1)}


def run_all(options, folder):
    upstream = free_port()
    mock = subprocess.Popen([sys.executable, str(LOAD), "mock", str(upstream)])
    peers = dict(peer.partition("=")[::2] for peer in options.peer)
    stacks = {"direct": None, "gateway": f"{shlex.quote(sys.executable)} -m deployments.gateway"} | peers
    results = {}
    try:
        wait_for(upstream)
        for name, command in stacks.items():
            proxy = Proxy(name, command, upstream, folder)
            try:
                before = proxy.rss_mb() if proxy.process else 0.0
                results[name] = measure(proxy, options.seconds, options.rounds, options.warm_s)
                if proxy.process:
                    results[name]["rss_mb"] = {"start": before, "end": proxy.rss_mb()}
            finally:
                proxy.stop()
            sys.stderr.write(f"{name}: {json.dumps(results[name])}\n")
    finally:
        mock.kill()
    direct = results["direct"]
    for name, result in results.items():
        for key in direct if name != "direct" else ():
            times = [what for what in direct[key] if what.endswith("_ms")]
            result[key] |= {f"added_{what}": round(result[key][what] - direct[key][what], 2) for what in times}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-s", type=float, default=2.0, help="40 for LiteLLM, which imports while it serves")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of load under which memory is watched")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cpu")
    parser.add_argument("--write-baseline", action="store_true", help="make this run the committed baseline")
    options = parser.parse_args()
    place = ROOT / "tests/bench/baselines" / f"gateway_{options.machine}.json"
    known = json.loads(place.read_text()) if place.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="bench-gateway-"))
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        head = {"name": "gateway", "machine": options.machine, "commit": commit.stdout.strip(), "traces": "on"}
        if options.soak:
            report = known
            report["soak"] = {"commit": head["commit"]} | soak(options.soak, folder)
        else:
            report = head | {"seconds": options.seconds, "rounds": options.rounds, "stacks": run_all(options, folder)}
            report |= {name: known[name] for name in ("soak",) if name in known}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.write_baseline:
        place.write_text(json.dumps(report, indent=1) + "\n")
        sys.stderr.write(f"{place}\n")
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
