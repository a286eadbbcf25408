"""The merge ledger: rows for the file beside the shards, and a table for a person.

Ring: pure.
"""

from typing import Any, Protocol

from tasks.artifacts import MergedModel
from tasks.merge.plan import Headers, Output

_SHOWN = 200


class Sums(Protocol):
    """What was summed up while a parameter was made."""

    norm: float
    a_norm: float
    b_norm: float
    squared_error: float
    squared_size: float
    kept: float


def ledger_rows(
    outputs: tuple[Output, ...], adapter: Headers, sums: Any, shard: str
) -> dict[str, list[dict[str, Any]]]:  # Any: a dict of name -> Sums (dict is invariant); JSON values
    """Return {"changes": a row per changed parameter, "adapter": per adapter tensor, "requantized": per MXFP4 one}."""
    rows: dict[str, list[dict[str, Any]]] = {"changes": [], "adapter": [], "requantized": []}
    for output in (output for output in outputs if output.name in sums):
        found: Sums = sums[output.name]
        place = {"tensor": output.name, "shape": list(output.shape), "shard": shard}
        if change := output.change:
            pair = {"lora_A": change.a_key, "lora_B": change.b_key, "scale": change.scale, "delta_norm": found.norm}
            rows["changes"].append({**place, **pair})
            for key, norm in ((change.a_key, found.a_norm), (change.b_key, found.b_norm)):
                shape = adapter[key]["shape"]
                rows["adapter"].append(
                    {"tensor": key, "target": output.name, "shape": shape, "norm": norm, "shard": shard}
                )
        if len(output.stored) == 2:
            error = {"mxfp4_error": (found.squared_error / found.squared_size) ** 0.5 if found.squared_size else 0.0}
            kept = {"change_kept": found.kept / found.norm**2 if found.norm else None}
            rows["requantized"].append({**place, **error, "error_norm": found.squared_error**0.5, **kept})
    return rows


def ledger_markdown(merged: MergedModel, about: dict[str, Any]) -> str:  # Any: the manifest's account of the merge
    """Return the ledger for a person; the whole of it lies beside the shards."""
    changes, requantized, peft = about["ledger"], about.get("requantized", []), about.get("peft")
    rows = [
        f"| `{entry['tensor']}` | {' × '.join(map(str, entry['shape']))} | {entry['delta_norm']:.4g} | "
        f"{entry['scale']:g} | {entry['shard']} |"
        for entry in changes[:_SHOWN]
    ]
    more = f"\n{len(changes) - _SHOWN} more in merge_ledger.json.\n" if len(changes) > _SHOWN else ""
    checked = (
        f"PEFT's own delta was computed for {peft['values']:,} values of {peft['tensors']} tensors: the largest "
        f"difference is {peft['largest_gap']:.2g} of a delta's norm.\n\n"
        if peft
        else ""
    )
    return (
        f"# Merge ledger {merged.short}\n\n{merged.num_changed} of {merged.num_tensors} tensors changed, "
        f"{merged.total_bytes / 1e9:.3f} GB in {merged.num_shards} shard(s), digest `{merged.model_digest[:16]}`.\n\n"
        + checked
        + "| tensor | shape | norm of the change | scale | shard |\n|---|---|---:|---:|---|\n"
        + "\n".join(rows)
        + "\n"
        + more
        + _requantized_markdown(requantized)
    )


def _requantized_markdown(rows: list[dict[str, Any]]) -> str:  # Any: ledger rows
    if not rows:
        return ""
    lines = [
        f"| `{row['tensor']}` | {row['mxfp4_error']:.2%} | "
        f"{'untouched' if row['change_kept'] is None else format(row['change_kept'], '.0%')} |"
        for row in rows[:_SHOWN]
    ]
    return (
        "\n## What MXFP4 costs\n\nThe error is relative (Frobenius); of a change, what is left along its own direction "
        "after rounding.\n\n| tensor | error | change that is left |\n|---|---:|---:|\n" + "\n".join(lines) + "\n"
    )
