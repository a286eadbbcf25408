"""Provenance as text: one line for each artifact, as a tree.

Ring: pure.
"""

from collections.abc import Callable
from typing import Any

from deployments.provenance.lineage import Branch, Node

Fields = dict[str, Any]  # Any: JSON values


def tree_lines(branch: Branch, notes: Callable[[Node], list[str]]) -> list[str]:
    """Return a tree's lines; `notes` are further lines of a node."""
    return _lines(branch, notes, "", "")


def _lines(branch: Branch, notes: Callable[[Node], list[str]], first: str, rest: str) -> list[str]:
    if branch.is_repeated:
        return [f"{first}{short(branch.node.ref)} (above)"]
    has_more = bool(branch.branches)
    lines = [first + say_node(branch.node)]
    lines += [f"{rest}{'│' if has_more else ' '}     {note}" for note in notes(branch.node)]
    for index, below in enumerate(branch.branches):
        is_last = index == len(branch.branches) - 1
        mark, indent = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        lines += _lines(below, notes, rest + mark, rest + indent)
    return lines


def short(ref: str) -> str:
    """Return `kind/` and the first eight digits.

    >>> short("merged/0123456789abcdef")
    'merged/01234567'
    """
    kind, _, key = ref.partition("/")
    return f"{kind}/{key[:8]}"


def say_node(node: Node) -> str:
    """Return one line about an artifact."""
    if node.is_cleared:
        return f"{short(node.ref)}  (cleared away)"
    say = _SAY.get(node.kind)
    return f"{short(node.ref)}  {say(node.fields) if say else ''}".rstrip() + f"  [{node.created_at[:16]}]"


def _dataset(fields: Fields) -> str:
    counts = f"{fields['num_train_rows']} train, {fields['num_validation_rows']} validation rows"
    return f"{fields['source']} at {fields['revision'][:12]}, {counts}, {fields['num_rejected_rows']} rejected"


def _adapter(fields: Fields) -> str:
    losses = f"validation loss {fields['validation_loss_before']:.4f} to {fields['validation_loss_after']:.4f}"
    return f"digest {fields['adapter_digest'][:12]}, {fields['num_steps']} steps, {losses}"


def _published(fields: Fields) -> str:
    return f"{fields['repo_id']}@{fields['commit'][:12]} ({fields['place']}), digest {fields['model_digest'][:12]}"


def _health(fields: Fields) -> str:
    verdict = "passed" if fields["passed"] else "FAILED"
    return f"verification {verdict}: served {fields['served_logprob']:.4f}, base {fields['base_logprob']:.4f}"


def _evaluation(fields: Fields) -> str:
    loss = fields["validation_loss"]
    return (
        f"evaluation by {fields['source']}: loss {'-' if loss is None else f'{loss:.4f}'}, choices "
        f"{fields['choice_accuracy']:.3f}, exact {fields['exact_accuracy']:.3f}, "
        f"safety {fields['safety_preferred']:.3f}"
    )


_SAY: dict[str, Callable[[Fields], str]] = {
    "dataset": _dataset,
    "base": lambda fields: f"{fields['origin']}, digest {fields['model_digest'][:12]}",
    "pretrained": lambda fields: f"{fields['origin']}, digest {fields['model_digest'][:12]}",
    "corpus": lambda fields: f"{fields['source']}, {fields['num_tokens']:,} tokens",
    "packed": lambda fields: f"{fields['num_train_documents']} documents in {fields['num_train_rows']} rows",
    "adapter": _adapter,
    "merged": lambda fields: f"digest {fields['model_digest'][:12]}, {fields['num_changed']} tensors changed",
    "published": _published,
    "served": lambda fields: f"{fields['served_model_name']} at {fields['gateway_url']}",
    "health": _health,
    "evaluation": _evaluation,
    "decision": lambda fields: "promoted" if fields["promoted"] else f"NOT promoted: {'; '.join(fields['reasons'])}",
}
