"""The decision for a person: three models side by side, every check, what changed.

Ring: pure.
"""

from dataclasses import dataclass
from typing import Any

from tasks.evaluate.decide import Verdict
from tasks.evaluate.results import Results, share

_SHOWN = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Who was compared, in the order of the columns."""

    candidate: Results
    incumbent: Results | None
    base: Results

    def named(self) -> dict[str, Results]:
        """Return the columns that there are."""
        columns = {"candidate": self.candidate, "incumbent": self.incumbent, "base": self.base}
        return {name: results for name, results in columns.items() if results is not None}


def figures(results: Results) -> dict[str, float | None]:
    """Return every figure of one model by name."""
    found: dict[str, float | None] = {"validation loss, nats per token": results.validation_loss}
    for group, title in (("taught", "what the data teach"), ("kept", "what must not be unlearnt")):
        items = [item for item in results.questions if item.group == group]
        if items:
            found[f"{title} ({len(items)}), choices"] = share([item.is_chosen for item in items])
            found[f"{title} ({len(items)}), exact"] = share([item.is_exact for item in items])
    for expected, title in (("refuse", "harmful requests refused"), ("answer", "harmless lookalikes answered")):
        items = [item for item in results.safety if item.expected == expected]
        if items:
            found[f"{title} ({len(items)}), preferred"] = share([item.is_preferred for item in items])
            found[f"{title} ({len(items)}), generated"] = share([item.is_generated for item in items])
    return found | {plugin: metric.value for plugin, metric in results.plugins.items()}


def differences(compared: Compared) -> list[dict[str, Any]]:  # Any: cells are plain values
    """Return the items on which candidate and another model differ, one row each."""
    rows: list[dict[str, Any]] = []
    ours = compared.candidate
    for name, other in compared.named().items():
        if other is ours:
            continue
        for mine, theirs in zip(ours.questions, other.questions, strict=True):
            for way, was, now in (
                ("choice", (theirs.is_chosen, theirs.chosen), (mine.is_chosen, mine.chosen)),
                ("exact", (theirs.is_exact, theirs.said), (mine.is_exact, mine.said)),
            ):
                if was[0] != now[0]:
                    rows.append(_row(mine.id, way, name, was, now))
        for mine, theirs in zip(ours.safety, other.safety, strict=True):
            for way, was, now in (
                ("preference", (theirs.is_preferred, str(theirs.scores)), (mine.is_preferred, str(mine.scores))),
                ("generated", (theirs.is_generated, theirs.said), (mine.is_generated, mine.said)),
            ):
                if was[0] != now[0]:
                    rows.append(_row(mine.id, way, name, was, now))
    return rows


def _row(id: str, way: str, name: str, was: tuple[bool, str], now: tuple[bool, str]) -> dict[str, Any]:
    return {
        "id": id,
        "way": way,
        "against": name,
        "change": "won" if now[0] else "lost",
        "other": was[1],
        "candidate": now[1],
    }


def decision_markdown(model: str, compared: Compared, verdict: Verdict, folder: str) -> str:
    """Return verdict, table of figures, checks and the first differences."""
    columns = {name: figures(results) for name, results in compared.named().items()}
    lines = [
        f"# {model}: {'promoted' if verdict.promoted else 'NOT promoted'}",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for figure in columns["candidate"]:
        cells = [_number(values.get(figure)) for values in columns.values()]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    lines += ["", "## Checks", ""]
    lines += [f"- {'passed' if check.passed else '**FAILED**'}: {check.text}" for check in verdict.checks]
    rows = differences(compared)
    lines += ["", f"## {len(rows)} differences", "", f"All of them: `{folder}/differences.jsonl`", ""]
    if rows:
        lines += ["| question | way | against | | there | candidate |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['id']} | {row['way']} | {row['against']} | {row['change']} | {_cell(row['other'])} "
        f"| {_cell(row['candidate'])} |"
        for row in rows[:_SHOWN]
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "/")[:60]
    return shown.replace("`", "'") or "-"
