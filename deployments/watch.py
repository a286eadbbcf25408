"""`tatara watch`: a run that learns, live in a terminal, or as one page that renews itself.

    metrics.csv + generations.csv (rewards) | metrics.jsonl (SFT, pretraining) -> lines | page

Ring: edge (terminal, disk, a loopback server).
"""

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deployments.watch_page import page
from tasks import files
from tasks.artifacts import ArtifactStore
from tasks.errors import MissingError, PortTakenError, SpecError, TataraError
from tasks.metrics import read_metrics
from tasks.reinforce.streams import NewRows

_KINDS = ("adapter", "pretrained")
_EVERY_S = 2.0
_SHOWN_ROWS = 40  # on the page


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run's folder and what its streams are called."""

    folder: Path
    metrics: Path
    generations: Path | None  # None: it generates nothing
    rewards: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`kind/key`, as other commands take it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def records(self) -> list[dict[str, Any]]:  # Any: JSON values
        """Return every step so far."""
        return read_metrics(self.metrics)

    def is_done(self) -> bool:
        """Say whether its artifact is whole."""
        return (self.folder / "manifest.json").exists()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `tatara watch` takes."""
    parser.add_argument("run", nargs="?", default="latest", help="first digits of a run's folder, or latest")
    parser.add_argument("--page", type=int, metavar="PORT", help="serve a page on 127.0.0.1:PORT that renews itself")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page to a file, anew every two seconds")
    parser.add_argument("--once", action="store_true", help="say what there is, and end")


def run(options: argparse.Namespace) -> int:
    """Follow the run until it is done; return the exit status."""
    found = find_run(options.run, ArtifactStore.default().root)
    if options.page:
        return _serve(found, options.page)
    _say(f"watching {found.folder}")
    followed = Follower(found)
    while True:
        for line in followed.lines():
            _say(line)
        if options.html:
            files.write_text(options.html, render(found, followed.rows))
        if options.once or found.is_done():
            return 0
        time.sleep(_EVERY_S)


def find_run(name: str, root: Path) -> Run:
    """Return the run whose folder begins with `name`, or for `latest` the one that was written to last.

    Raises: MissingError listing what exists, SpecError when several fit.
    """
    folders = [path.parent for kind in _KINDS for path in (root / kind).glob("*/metrics.jsonl")]
    folders.sort(key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime)
    digits = name.rpartition("/")[2]
    fitting = folders[-1:] if name == "latest" else [folder for folder in folders if folder.name.startswith(digits)]
    known = ", ".join(folder.name[:8] for folder in folders[-8:]) or "none"
    if not fitting or not digits:
        raise MissingError(f"there is no run {name!r} with metrics below {root}; there are: {known}")
    if len(fitting) > 1:
        raise SpecError(f"run {name!r} fits {len(fitting)} of: {known}; give more digits")
    return open_run(fitting[0])


def open_run(folder: Path) -> Run:
    """Return what a run's own job says of its streams."""
    try:
        spec = files.read_json(folder / "job.json")["spec"]
    except (FileNotFoundError, TataraError, KeyError):
        spec = {}
    rewards = [each.get("label") or each["name"].rpartition(":")[2] for each in spec.get("rewards", ())]
    generations = folder / spec["generations_csv"] if "generations_csv" in spec else None
    return Run(folder=folder, metrics=folder / "metrics.jsonl", generations=generations, rewards=tuple(rewards))


class Follower:
    """What is new since the last look: a line a step, and the best and worst completion of it."""

    def __init__(self, run: Run) -> None:
        self.run, self._step = run, 0
        self.rows = NewRows(run.generations, keep=_SHOWN_ROWS) if run.generations else None
        self._completions: dict[str, list[dict[str, str]]] = {}  # by step, until its record is there

    def lines(self) -> list[str]:
        """Return lines for a terminal."""
        new = [record for record in self.run.records() if record["step"] > self._step]
        said: list[str] = []
        rows = self.rows.read() if self.rows else []
        if self.rows and self.rows.is_anew:  # a resume has cut them, and they are all here again
            self._completions.clear()
        for row in rows:
            if int(row["step"]) > self._step:
                self._completions.setdefault(row["step"], []).append(row)
        for record in new:
            self._step = record["step"]
            said.append(say_step(record, self.run.rewards))
            if rows := self._completions.pop(str(self._step), None):
                said += [f"    {line}" for line in best_and_worst(rows)]
        return said


def best_and_worst(rows: list[dict[str, str]]) -> list[str]:
    """Return the completions of the highest and the lowest reward in a line each.

    >>> row = {"question": "1+1?", "completion": "2", "answer": "2", "reward": "1"}
    >>> best_and_worst([row, row | {"completion": "7", "reward": "0"}])
    ['+1.00  1+1? -> 2', '+0.00  1+1? -> 7']
    """
    ordered = sorted(rows, key=lambda row: -float(row["reward"]))
    return [
        f"{float(row['reward']):+.2f}  {_short(row['question'])} -> {_short(row['completion'])}"
        for row in (ordered[0], ordered[-1])
    ]


def say_step(record: dict[str, Any], rewards: tuple[str, ...] = ()) -> str:  # Any: JSON values
    """Return one step in a line; of SFT its loss, of rewards each of them.

    >>> say_step({"step": 3, "num_steps": 9, "loss": 1.25, "tokens_per_s": 17310})
    'step 3/9  loss 1.2500  17,310 tokens/s'
    """
    parts = [f"step {record['step']}/{record.get('num_steps', '?')}"]
    if record.get("reward") is not None:
        parts.append(f"reward {record['reward']:.3f}")
        means = {name: record.get(f"{name}_mean") for name in rewards}
        parts += [f"{name} {mean:.3f}" for name, mean in means.items() if mean is not None]
    parts.append(f"loss {record['loss']:.4f}")
    for name, form in (("kl", "KL {:.4f}"), ("completion_tokens", "{:.0f} tokens"), ("ratio_mean", "ratio {:.3f}")):
        if record.get(name) is not None:
            parts.append(form.format(record[name]))
    if record.get("adapter_share") is not None:
        parts.append(f"adapter {100 * record['adapter_share']:.0f} %")
    if speed := record.get("rollout_tokens_per_s") or record.get("tokens_per_s"):
        parts.append(f"{speed:,.0f} tokens/s")
    return "  ".join(parts)


def render(run: Run, rows: NewRows | None) -> str:
    """Return the page of a run with the newest completions that were read."""
    return page(run.name, run.records(), list(rows.newest) if rows else [], run.rewards, is_done=run.is_done())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _short(text: str, most: int = 60) -> str:
    one = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())  # no escapes to a terminal
    return one if len(one) <= most else one[: most - 1] + "…"


def _serve(run: Run, port: int) -> int:
    rows, lock = Follower(run).rows, threading.Lock()

    def newest_page() -> str:
        with lock:  # of several who look
            if rows:
                rows.read()
            return render(run, rows)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page, or with the records alone."""
            is_json = self.path == "/metrics.json"
            data = (json.dumps(run.records()) if is_json else newest_page()).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json" if is_json else "text/html; charset=utf-8")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: a page that renews itself would fill the terminal."""
            del format, args

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise PortTakenError(f"port {port} of 127.0.0.1 can't be taken ({os.strerror(error.errno or 0)})") from error
    _say(f"watching {run.folder}\nhttp://127.0.0.1:{port}")
    with server:
        server.serve_forever()
    return 0
