"""The merge ledger as a table: which tensor got which change, and how large it is.

Ring: pure.
"""

from typing import Any

from tasks.artifacts import MergedModel

_SHOWN = 200


def ledger_markdown(merged: MergedModel, changes: list[dict[str, Any]]) -> str:  # Any: ledger entries
    """Return the ledger for a person; the whole of it lies beside the shards."""
    rows = [
        f"| `{entry['tensor']}` | {' × '.join(map(str, entry['shape']))} | {entry['delta_norm']:.4g} | "
        f"{entry['scale']:g} | {entry['shard']} |"
        for entry in changes[:_SHOWN]
    ]
    more = f"\n{len(changes) - _SHOWN} more in merge_ledger.json.\n" if len(changes) > _SHOWN else ""
    return (
        f"# Merge ledger {merged.short}\n\n{merged.num_changed} of {merged.num_tensors} tensors changed, "
        f"{merged.total_bytes / 1e9:.3f} GB in {merged.num_shards} shard(s), digest `{merged.model_digest[:16]}`.\n\n"
        "| tensor | shape | norm of the change | scale | shard |\n|---|---|---:|---:|---|\n"
        + "\n".join(rows)
        + "\n"
        + more
    )
