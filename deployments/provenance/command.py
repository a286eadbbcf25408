"""`tatara provenance ID`: where does this answer come from, where did this row go?

    answer's id -> trace -> model digest -> served, published, merged, adapter, packed, data set, rows
    row         -> data sets -> packed, adapters, merged, published, served models and their reports

ID is the x-request-id of an answer or the id in its body; a row's id, hash or text; an artifact's `kind/key`, key,
digest or commit; a flow run's id. Needs the store and the trace queue, no Prefect and no torch.

Ring: edge (disk, network for Weave). Exit status 0; an unknown id is an error that lists where it looked.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.provenance.answers import Trace, find_trace, looks_like_answer
from deployments.provenance.lineage import Branch, Json, Lineage, Node
from deployments.provenance.rows import SPLITS, FoundRow, find_rows, read_run, row_ids
from deployments.provenance.say import say_node, short, tree_lines
from tasks import files
from tasks.artifacts import KINDS, MANIFEST
from tasks.errors import CorruptError, MissingError

_MOST_ROWS = 20
_SHOWN_IDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `tatara provenance` understands to its parser."""
    parser.add_argument("id", metavar="ID", help="of an answer, a data row (or its text), an artifact or a flow run")
    parser.add_argument("--json", action="store_true", help="as JSON, with all row ids")
    parser.add_argument("--rows", action="store_true", help="list all training rows")


def run(options: argparse.Namespace) -> int:
    """Print the provenance of one id; return the exit status."""
    root = Path(os.environ.get("TATARA_HOME") or ".tatara").expanduser().resolve()
    found = explain(options.id, root, os.environ)
    if options.json:
        print(json.dumps(found.values(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(found.lines(show_rows=options.rows)))
    return 0


class Found:
    """What an id turned out to be, and the trees that hang on it."""

    def __init__(self, lineage: Lineage, root: Path, kind: str, head: list[str]) -> None:
        self.lineage, self.root, self.kind, self.head = lineage, root, kind, head
        self.trace: Trace | None = None
        self.rows: list[FoundRow] = []
        self.up: list[Branch] = []
        self.down: list[Branch] = []
        self.run: Json | None = None

    def lines(self, *, show_rows: bool = False) -> list[str]:
        """Return the text for a person."""
        lines = list(self.head)
        for title, branches, notes in (
            ("made of", self.up, lambda node: self._row_notes(node, show_rows=show_rows)),
            ("went into", self.down, self._coverage_notes),
        ):
            for branch in branches:
                lines += ["", f"{title}:", *tree_lines(branch, notes)]
        return lines

    def values(self) -> Json:
        """Return everything as JSON values."""
        nodes = [node for branch in self.up for node in branch.walk() if node.kind == "dataset" and not node.is_cleared]
        return {
            "kind": self.kind,
            "trace": asdict(self.trace) if self.trace else None,
            "run": self.run,
            "rows": [{**asdict(row), "hash": row.hash} for row in self.rows],
            "made_of": [_values(branch) for branch in self.up],
            "went_into": [_values(branch) for branch in self.down],
            "data_rows": {node.ref: {split: row_ids(node, split) for split in SPLITS} for node in nodes},
        }

    def _row_notes(self, node: Node, *, show_rows: bool) -> list[str]:
        if node.kind == "served":
            return [say_node(check) for check in self.lineage.children(node.ref) if check.is_check]
        if node.kind != "dataset" or node.is_cleared:
            return []
        ids = row_ids(node, "train")
        if show_rows:
            return [f"row {row_id}" for row_id in ids]
        more = f" and {len(ids) - _SHOWN_IDS} more (--rows lists them)" if len(ids) > _SHOWN_IDS else ""
        return [f"rows {', '.join(ids[:_SHOWN_IDS])}{more}"]

    def _coverage_notes(self, node: Node) -> list[str]:
        """Say where a row of the data set may have been left out: too long for packing, or not reached by training."""
        if node.is_cleared or not self.rows:
            return []
        if node.kind == "adapter":
            return _unreached(node, self.lineage)
        if node.kind != "packed" or not node.about.get("num_dropped"):
            return []
        dropped = node.about.get("dropped_rows")
        if dropped is None:
            return [f"{node.about['num_dropped']} documents were too long and dropped: this row may be one of them"]
        gone = sorted({row.row_id for row in self.rows} & set(dropped))
        return [f"DROPPED here, too long: {', '.join(gone)}"] if gone else []


def _unreached(adapter: Node, lineage: Lineage) -> list[str]:
    """Say how many packed rows a training of less than an epoch learnt."""
    per_step = 1
    for name in ("rows_per_device", "gradient_accumulation", "num_processes"):
        per_step *= adapter.spec.get(name, 1)
    learnt = adapter.fields.get("num_steps", 0) * per_step
    [rows] = [
        lineage.get(ref).fields.get("num_train_rows", 0) for ref in adapter.parents if ref.startswith("packed/")
    ] or [0]
    return [f"learnt {learnt} of {rows} packed rows: this one may not be among them"] if learnt < rows else []


def _values(branch: Branch) -> Json:
    node = branch.node
    values: Json = {"ref": node.ref}
    if branch.is_repeated:
        return values | {"above": True}
    values |= {"cleared": True} if node.is_cleared else {"created_at": node.created_at, "folder": node.folder}
    return values | {"fields": node.fields, "branches": [_values(below) for below in branch.branches]}


def explain(wanted: str, root: Path, variables: Mapping[str, str]) -> Found:
    """Say what an id is and what hangs on it. Raises MissingError listing where it looked."""
    lineage = read_lineage(root)
    if looks_like_answer(wanted):
        run = read_run(root, wanted)
        if run is not None:
            return _of_run(wanted, run, lineage, root)
        trace, looked = find_trace(wanted, root, variables)
        if trace:
            return _of_trace(trace, lineage, root)
        raise _missing(wanted, [f"flow runs below {root / 'runs'}", *looked], root)
    if nodes := lineage.named(wanted):
        return _of_artifact(nodes, lineage, root)
    datasets = lineage.of_kind("dataset")
    if rows := [row for dataset in datasets for row in find_rows(dataset, wanted)]:
        return _of_rows(rows, lineage, root)
    trace, looked = find_trace(wanted, root, variables)
    if trace:
        return _of_trace(trace, lineage, root)
    there = [f"{len(lineage.nodes)} artifacts below {root}", f"the rows of {len(datasets)} data sets", *looked]
    raise _missing(wanted, there, root)


def read_lineage(root: Path) -> Lineage:
    """Read every manifest below a store's root. Cost: about 0.1 ms each; files of artifacts are not looked at."""
    nodes: list[Node] = []
    for kind in KINDS:
        for path in (root / kind).glob(f"*/{MANIFEST}"):
            try:
                manifest: Any = files.read_json(path)  # Any: JSON values
                fields = dict(manifest["artifact"])
                node = Node(
                    ref=f"{kind}/{fields.pop('key')}",
                    folder=str(path.parent),
                    parents=tuple(fields.pop("parents", ())),
                    created_at=manifest["created_at"],
                    fields=fields,
                    about=manifest.get("about") or {},
                    spec=manifest.get("spec") or {},
                )
            except (CorruptError, OSError, KeyError, TypeError, ValueError):
                continue  # half a folder is no artifact; its step makes it again
            nodes.append(node)
    return Lineage(nodes)


def _of_trace(trace: Trace, lineage: Lineage, root: Path) -> Found:
    head = [f"answer {trace.trace_id}", f"  found in {trace.place}"]
    head.append(f"  {trace.started_at}, {trace.status}, route {trace.route}, asked for {trace.model or 'no model'}")
    head.append(f"  model digest {trace.model_digest or 'unknown'}, adapter digest {trace.adapter_digest or 'unknown'}")
    found = Found(lineage, root, "answer", head)
    found.trace = trace
    found.run = read_run(root, trace.run_id) if trace.run_id else None
    head.append(_say_run(trace.run_id, found.run) if trace.run_id else "  served by no flow run (tatara services?)")
    if not trace.model_digest and not trace.adapter_digest:
        head.append(
            "  the gateway was not told which model it serves (route lite, or started without TATARA_MODEL_DIGEST)"
        )
        return found
    nodes = lineage.with_digest(trace.model_digest) if trace.model_digest else []
    served = [node for node in nodes if node.kind == "served"]
    before = [node for node in served if _moment(node.created_at) <= _moment(trace.started_at)]
    chosen = (before or served or nodes)[-1 if served else 0 :][:1]
    if not chosen and trace.adapter_digest:
        chosen = lineage.with_digest(trace.adapter_digest)[:1]
    if not chosen:
        head.append(
            f"  no artifact below {root} has these digests: set TATARA_HOME to the store of the run that served it"
        )
    found.up = [lineage.up(node.ref) for node in chosen]
    return found


def _of_run(run_id: str, run: Json, lineage: Lineage, root: Path) -> Found:
    found = Found(lineage, root, "run", [f"flow run {run_id}", _say_run(run_id, run)])
    found.run = run
    return found


def _of_artifact(nodes: list[Node], lineage: Lineage, root: Path) -> Found:
    names = ", ".join(short(node.ref) for node in nodes)
    found = Found(lineage, root, "artifact", [f"artifact {names}"])
    found.up = [lineage.up(nodes[0].ref)]
    found.down = [lineage.down(nodes[-1].ref)]
    return found


def _of_rows(rows: list[FoundRow], lineage: Lineage, root: Path) -> Found:
    head: list[str] = []
    for row in rows[:_MOST_ROWS]:
        what = f"rejected: {row.reason}; it went into no model" if row.reason else f"hash {row.hash[:16]}"
        what += " (measured, not learnt)" if row.split == "validation" else ""
        head.append(f"row {row.row_id} of {short(row.dataset)}, {row.split}, {what}")
    if len(rows) > _MOST_ROWS:
        head.append(f"... and {len(rows) - _MOST_ROWS} more rows: give an id, a hash or more of the text")
    found = Found(lineage, root, "row", head)
    found.rows = rows
    used = dict.fromkeys(row.dataset for row in rows if not row.reason)
    found.down = [lineage.down(dataset) for dataset in used]
    return found


def _say_run(run_id: str, run: Json | None) -> str:
    if run is None:
        return f"  flow run {run_id} (its recipe is not in this store)"
    base = run.get("resolved", {}).get("base", {}).get("model", "")
    return f"  flow run {run_id}, recipe {run.get('recipe')}{f', base {base}' if base else ''}"


def _moment(text: str) -> str:
    """Make the store's and the gateway's times comparable as text: both UTC, to the second."""
    return text[:19]


def _missing(wanted: str, looked: list[str], root: Path) -> MissingError:
    places = "".join(f"\n  {place}" for place in looked)
    return MissingError(
        f"{wanted!r} was not found. Looked at:{places}\nSet TATARA_HOME (now {root}), FILE_QUEUE_PATH and REDIS_URL to "
        "those of the machine that served it, or WANDB_API_KEY and WANDB_ENTITY when its traces went to Weave"
    )
