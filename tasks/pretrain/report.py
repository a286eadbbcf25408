"""A pretraining that runs, for a person: where it stands, and its last records as a table.

Ring: pure.  Units: nats per token.
"""

import math
from collections.abc import Sequence
from typing import Any

from tasks.pictures import normalised_entropy

_SHOWN = 12
Record = dict[str, Any]  # Any: JSON values


def live_markdown(records: Sequence[Record], usage: Sequence[Record] = (), held_out: Sequence[Record] = ()) -> str:
    """Return what a pretraining has come to.

    Args:
        records: of metrics.jsonl.
        usage: of experts.jsonl, {"step", "usage": (layers, experts) shares}.
        held_out: of evaluations.jsonl, {"step", "eval_loss"}.

    >>> print(live_markdown([{"step": 2, "num_steps": 9, "loss": 1.0, "accuracy": 0.25, "learning_rate": 1e-4}]))
    # Step 2 of 9
    <BLANKLINE>
    | step | loss | perplexity | accuracy | learning rate | tokens/s | MFU | GB at most |
    |---:|---:|---:|---:|---:|---:|---:|---:|
    | 2 | 1.0000 | 2.72 | 0.250 | 1.00e-04 |  |  |  |
    """
    if not records:
        return "No step is logged yet."
    last = records[-1]
    left = last.get("seconds_left")
    head = f"# Step {last['step']} of {last.get('num_steps', '?')}"
    lines = [head + (f", {math.ceil(left / 60)} min left" if left is not None else ""), ""]
    lines += [
        "| step | loss | perplexity | accuracy | learning rate | tokens/s | MFU | GB at most |",
        f"|{'---:|' * 8}",
    ]
    lines += [_row(record) for record in records[-_SHOWN:][::-1]]
    if held_out:
        said = ", ".join(f"{at['eval_loss']:.4f} at {at['step']}" for at in held_out[-_SHOWN:])
        lines += ["", f"Loss of what is held out, by step: {said}."]
    if usage:
        said = ", ".join(f"{_evenness(layer):.3f}" for layer in usage[-1]["usage"])
        lines += ["", f"Experts at step {usage[-1]['step']}: normalised entropy of each layer {said} (1: used alike)."]
    return "\n".join(lines)


def _row(record: Record) -> str:
    peak = record.get("peak_gpu_bytes") or record.get("peak_host_bytes")
    cells = [
        f"{record['step']}",
        f"{record['loss']:.4f}",
        f"{math.exp(min(record['loss'], 80.0)):,.2f}",
        _cell(record.get("accuracy"), ".3f"),
        _cell(record.get("learning_rate"), ".2e"),
        _cell(record.get("tokens_per_s"), ","),
        _cell(record.get("mfu_pct"), ".1f", " %"),
        _cell(peak / 1e9 if peak else None, ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _evenness(shares: Sequence[float]) -> float:
    total = sum(shares)
    return normalised_entropy([share / total for share in shares]) if total else 0.0
