"""The main job on a bare machine: set up Prefect, run finetune/tiny, show what came of it.

    server, pools, deployments, worker -> prefect deployment run finetune/tiny --watch -> table, URLs, a curl line

Ring: edge.
"""

import contextlib
import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deployments import orchestration
from deployments.lost_runs import settle_lost_runs
from tasks.artifacts import KINDS, ArtifactStore, HealthReport
from tasks.errors import ServiceError

DRAIN = "ingest-traces/every-5-minutes"
_STEPS = ("corpus", "pretrained", "base", "dataset", "packed", "adapter", "merged", "published", "served", "health")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One watched flow run."""

    started: datetime
    seconds: float


def run_demo(prefect: orchestration.Prefect, deployment: str = "finetune/tiny") -> int:
    """Run the deployment and print what was made; return the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a log file has no edge
    begin = time.monotonic()
    console.print("[bold]1/4[/bold] Prefect server, work pools, deployments, worker")
    orchestration.start_server(prefect)
    fresh = orchestration.deploy(prefect)
    settle_lost_runs(prefect, "local")
    worker = orchestration.start_worker(prefect)
    console.print(f"    {prefect.ui_url}  ({'deployed' if fresh else 'deployed before'}, worker {worker})")
    console.print(f"[bold]2/4[/bold] prefect deployment run {deployment} --watch")
    run = watch(prefect, deployment, console)
    if run is None:
        console.print(f"[red]The run did not complete.[/red] Its page says which step and why: {prefect.ui_url}/runs")
        return 1
    console.print(f"[bold]3/4[/bold] prefect deployment run {DRAIN} --watch")
    if watch(prefect, DRAIN, console) is None:
        console.print("    the traces stay in the queue: a scheduled drain is at work, or its page says what failed")
    console.print("[bold]4/4[/bold] What was made")
    print_result(ArtifactStore(Path(prefect.variables["TATARA_HOME"])), run, prefect, console)
    console.print(f"\n{time.monotonic() - begin:.0f} s in all, of which the flow {run.seconds:.0f} s.")
    return 0


def watch(prefect: orchestration.Prefect, deployment: str, console: Console) -> Run | None:
    """Run the deployment to its end, its log on the terminal; None when it did not complete."""
    tag = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"  # the flow renames its run, a tag stays
    started = datetime.now(UTC)
    argv = prefect.command("deployment", "run", deployment, "--watch", "--watch-interval", "2", "--tag", tag)
    process = subprocess.Popen(
        argv,
        env=prefect.client_variables,
        cwd=orchestration.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    done = threading.Event()
    follower = threading.Thread(target=follow, args=(prefect, tag, console, done), daemon=True)
    follower.start()
    try:
        output, _ = process.communicate()
    finally:
        done.set()
        follower.join(timeout=10)
    if process.returncode:
        console.print(output.strip()[-1500:])
    run = read_run(prefect, tag)
    if run is None or run["state_type"] != "COMPLETED":
        return None
    return Run(started=started, seconds=run["total_run_time"])


def read_run(prefect: orchestration.Prefect, tag: str) -> dict[str, Any] | None:  # Any: JSON values
    """Return the flow run with that tag, or None."""
    found = orchestration.call(prefect, "/flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}, "limit": 1})
    return found[0] if found else None


def follow(prefect: orchestration.Prefect, tag: str, console: Console, done: threading.Event) -> None:
    """Print the run's log lines as they come; on a terminal, training steps move a bar instead."""
    bar = Progress(TextColumn("    {task.description}"), BarColumn(), TextColumn("{task.fields[said]}"),
                   TimeElapsedColumn(), console=console, transient=True)  # fmt: skip
    with bar if console.is_terminal else contextlib.nullcontext():
        task = bar.add_task("", total=None, said="waiting for the worker")
        for line in read_lines(prefect, tag, done):
            step = parse_step(line)
            if step and console.is_terminal:
                bar.update(task, completed=step[0], total=step[1], said=line)
            else:
                bar.update(task, said="")
                console.print(f"    {line}", markup=False)


def read_lines(prefect: orchestration.Prefect, tag: str, done: threading.Event) -> Iterator[str]:
    """Yield new log lines of the run, oldest first, until `done` and none are left."""
    offset = 0
    while True:
        last_round = done.wait(1.5)
        with contextlib.suppress(OSError):
            run = read_run(prefect, tag)
            query = (
                {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_ASC", "offset": offset}
                if run
                else {}
            )
            entries = orchestration.call(prefect, "/logs/filter", query) if query else []
            offset += len(entries)
            yield from (entry["message"].split("\n")[0] for entry in entries if is_worth_showing(entry))
        if last_round:
            return


def is_worth_showing(entry: dict[str, Any]) -> bool:  # Any: JSON values
    """Leave out Prefect's own routine; keep what the tasks say, and every warning."""
    return not entry["name"].startswith("prefect") or entry["level"] >= logging.WARNING


def parse_step(line: str) -> tuple[int, int] | None:
    """Return (step, steps) of a trainer's line.

    >>> parse_step("step 12/60  loss 5.1"), parse_step("merged shard 1/1")
    ((12, 60), None)
    """
    words = line.split()
    if len(words) < 2 or words[0] != "step":
        return None
    step, _, total = words[1].partition("/")
    return (int(step), int(total)) if step.isdigit() and total.isdigit() else None


def print_result(store: ArtifactStore, run: Run, prefect: orchestration.Prefect, console: Console) -> None:
    """Print the table of artifacts, the scores, the addresses and how to go on."""
    reports = store.committed(HealthReport)
    if not reports:
        raise ServiceError(
            f"the run completed but no health report is below {store.root}: is TATARA_HOME the worker's?"
        )
    report = reports[-1]
    table = Table(box=None, pad_edge=False)
    for column in ("step", "artifact", "this run", "seconds", "what"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for kind, manifest in chain(store, report):
        made = datetime.fromisoformat(manifest["created_at"]) >= run.started
        key = manifest["artifact"]["key"][:8]
        table.add_row(kind, key, "made" if made else "skipped", f"{manifest['seconds']:.1f}", describe(kind, manifest))
    console.print(table)
    console.print(
        f"\nproof: served {report.served_logprob:.4f}, merged files {report.merged_logprob:.4f}, base "
        f"{report.base_logprob:.4f} nats per token over {report.num_answers} validation answers\n"
        f"question: {report.question}\nanswer:   {report.answer}\n\n"
        f"Prefect   {prefect.ui_url}\ngateway   {report.gateway_url}  (/health, /v1/models)\n\n"
        f"{curl_line(report)}\n\nstop it all: make stop",
        markup=False,
    )


def chain(store: ArtifactStore, report: HealthReport) -> list[tuple[str, dict[str, Any]]]:  # Any: manifests
    """Return (kind, manifest) of the report and all its ancestors, in the line's order."""
    seen: dict[str, dict[str, Any]] = {}  # Any: manifests
    queue = [report.ref]
    while queue:
        ref = queue.pop()
        kind, _, key = ref.partition("/")
        manifest = store.manifest(KINDS[kind], key)
        if manifest and ref not in seen:
            seen[ref] = {**manifest, "folder": str(store.folder(KINDS[kind], key))}
            queue.extend(manifest["artifact"]["parents"])
    return sorted(((ref.partition("/")[0], m) for ref, m in seen.items()), key=lambda item: _STEPS.index(item[0]))


def describe(kind: str, manifest: dict[str, Any]) -> str:  # Any: JSON values
    """Return one line on what an artifact holds."""
    a = manifest["artifact"]
    lines = {
        "corpus": lambda: f"{a['num_documents']:,} documents, {a['num_tokens']:,} tokens",
        "pretrained": lambda: f"{a['num_parameters']:,} parameters, loss {a['first_loss']:.2f} -> {a['last_loss']:.2f}",
        "base": lambda: a["origin"],
        "dataset": lambda: f"{a['num_train_rows']} + {a['num_validation_rows']} chats",
        "packed": lambda: f"{a['num_train_rows']} rows, {a['num_train_tokens']:,} tokens, {a['fill_pct']:.0f} % full",
        "adapter": lambda: (
            f"{a['num_trainable']:,} trainable, validation loss {a['validation_loss_before']:.3f} -> "
            f"{a['validation_loss_after']:.3f}"
        ),
        "merged": lambda: f"{a['num_changed']} of {a['num_tensors']} tensors changed, {a['total_bytes'] / 1e6:.0f} MB",
        "published": lambda: f"{a['place']}: {a['url']}",
        "served": lambda: f"{a['served_model_name']} at {a['vllm_url']}" + (" (was running)" if a["reused"] else ""),
        "health": lambda: "passed" if a["passed"] else "FAILED",
    }
    return lines[kind]()


def curl_line(report: HealthReport) -> str:
    """Return a line that asks the served model.

    It is printed for a person's shell, so the JSON stands in single quotes.
    """
    body = {
        "model": report.served_model_name,
        "messages": [{"role": "user", "content": report.question}],
        "max_tokens": 64,
    }
    text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl -sS {report.gateway_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{text}'"
