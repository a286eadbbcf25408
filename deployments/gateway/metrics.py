"""Counts and times for `/metrics`, in Prometheus' text format, version 0.0.4.

    Metrics.note_end(...) per request -> Metrics.text() per scrape

Written by hand: prometheus_client costs more per request than this whole table, and six metrics need none
of what it brings. No prompt, key or name of a key is in here.

Ring: edge (reads the process's memory and CPU from /proc).  Units: seconds, bytes.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PREFIX = "tatara_gateway"


class _Histogram:
    """How often which time; the last bucket is for all that is longer."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        lines, count = [], 0
        for bound, number in zip((*_BOUNDS_S, "+Inf"), self.buckets, strict=True):
            count += number
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum_s:.6f}", f"{name}_count{{{labels}}} {count}"]


class Metrics:
    """The counts of one gateway since its start."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], int] = {}
        self._seconds: dict[str, _Histogram] = {}
        self._first: dict[str, _Histogram] = {}
        self._tokens = {"prompt": 0, "completion": 0}
        self._rejected: dict[str, int] = {}
        self._started_s = time.time()

    def note_end(self, endpoint: str, route: str, status: int, seconds: float, first_s: float | None) -> None:
        """Count one request. Cost: 2 us."""
        key = (endpoint, route, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        histogram = self._seconds.get(endpoint)
        if histogram is None:
            histogram = self._seconds[endpoint] = _Histogram()
            self._first[endpoint] = _Histogram()
        histogram.add(seconds)
        if first_s is not None:
            self._first[endpoint].add(first_s)

    def note_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of one answer."""
        self._tokens["prompt"] += prompt
        self._tokens["completion"] += completion

    def note_rejected(self, reason: str) -> None:
        """Count a request that no model server saw."""
        self._rejected[reason] = self._rejected.get(reason, 0) + 1

    def text(self, gauges: Mapping[str, Mapping[str, float]], traces: Mapping[str, Any]) -> str:  # Any: see below
        """Return all of it.

        Args:
            gauges: per name the values by label set, as `upstream="vllm"`, or by "" without one.
            traces: what Recorder.counts() says: numbers and flags by name.
        """
        lines = _metric("requests_total", "counter", "answered requests by endpoint, route and status")
        for (endpoint, route, status), count in sorted(self._requests.items()):
            labels = f'endpoint="{endpoint}",route="{route}",status="{status}"'
            lines.append(f"{_PREFIX}_requests_total{{{labels}}} {count}")
        for name, about, histograms in (
            ("request_seconds", "from the request to the end of the answer", self._seconds),
            ("first_token_seconds", "from the request to the first piece of the answer", self._first),
        ):
            lines += _metric(name, "histogram", about)
            for endpoint, histogram in sorted(histograms.items()):
                lines += histogram.lines(f"{_PREFIX}_{name}", f'endpoint="{endpoint}"')
        lines += _metric("tokens_total", "counter", "tokens of all answers")
        lines += [f'{_PREFIX}_tokens_total{{kind="{kind}"}} {count}' for kind, count in self._tokens.items()]
        lines += _metric("rejected_total", "counter", "requests that no model server saw, by reason")
        lines += [f'{_PREFIX}_rejected_total{{reason="{why}"}} {count}' for why, count in self._rejected.items()]
        for name, values in gauges.items():
            lines += _metric(name, "gauge", name.replace("_", " "))
            lines += [_sample(name, labels, value) for labels, value in values.items()]
        for name, value in traces.items():
            if isinstance(value, int | float):
                lines += [*_metric(f"traces_{name}", "gauge", f"traces: {name}"), _sample(f"traces_{name}", "", value)]
        return "\n".join([*lines, *self._process(), ""])

    def _process(self) -> list[str]:
        lines = []
        cpu = os.times()
        for name, kind, value in (
            ("resident_memory_bytes", "gauge", _resident_bytes()),
            ("cpu_seconds_total", "counter", cpu.user + cpu.system),
            ("start_time_seconds", "gauge", self._started_s),
        ):
            lines += [f"# TYPE process_{name} {kind}", f"process_{name} {value:.3f}"]
        return lines


def _metric(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {_PREFIX}_{name} {about}", f"# TYPE {_PREFIX}_{name} {kind}"]


def _sample(name: str, labels: str, value: float) -> str:
    shown = int(value) if value == int(value) else round(value, 6)
    return f"{_PREFIX}_{name}{{{labels}}} {shown}" if labels else f"{_PREFIX}_{name} {shown}"


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
