"""What a person wants to know of a fetched data set or base: counted row by row, shown as Markdown.

Ring: pure.  Units: characters, bytes.
"""

from array import array
from collections import Counter
from statistics import median
from typing import Any

from tasks.artifacts import BaseCheckpoint, FetchedDataset
from tasks.fetch.rows import Read, Row

_SHOWN_ROWS = 3
_SHOWN_REASONS = 20
_SHOWN_CHARACTERS = 2000
_SHOWN_FILES = 100


class Statistics:
    """Counts of a data set; holds four bytes a row, never the rows.

    >>> chat = [{"role": "user", "content": "何?"}, {"role": "assistant", "content": "祭り"}]
    >>> said = Statistics()
    >>> said.add(Read(split="train", row_id="x:1", row={"messages": chat}))
    >>> said.add(Read(split="train", row_id="x:2", reason="a is empty"))
    >>> said.num_rows["train"], said.num_rejected, said.values()["characters"]
    (1, 1, {'total': 4, 'median': 4, 'longest': 4})
    """

    def __init__(self) -> None:
        self.num_rows: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.first_rejected: list[Read] = []
        self._roles: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._characters = array("I")
        self._sample: Row = {}

    @property
    def num_rejected(self) -> int:
        """Rows that can't be learnt from."""
        return self.reasons.total()

    @property
    def total(self) -> int:
        """All rows that were read."""
        return self.num_rows.total() + self.num_rejected

    def add(self, read: Read) -> None:
        """Count one row."""
        if read.reason:
            self.reasons[read.reason] += 1
            if len(self.first_rejected) < _SHOWN_ROWS:
                self.first_rejected.append(read)
            return
        self.num_rows[read.split] += 1
        messages = read.row.get("messages", [])
        roles = [message["role"] for message in messages]
        self._roles.update(roles)
        self._turns[roles.count("assistant")] += 1
        self._characters.append(sum(len(message["content"]) for message in messages) or len(read.row.get("text", "")))
        self._sample = self._sample or {"row_id": read.row_id, **read.row}

    def values(self) -> dict[str, Any]:  # Any: JSON values
        """Return the counts as a manifest keeps them."""
        lengths = self._characters
        return {
            "rejected": dict(self.reasons.most_common(_SHOWN_REASONS)),
            "roles": dict(self._roles.most_common()),
            "turns": {str(count): num_rows for count, num_rows in sorted(self._turns.items()) if count},
            "characters": {
                "total": sum(lengths),
                "median": round(median(lengths)) if lengths else 0,
                "longest": max(lengths, default=0),
            },
            "sample": self._sample,
        }


def data_markdown(dataset: FetchedDataset, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return what a data set holds. One that an older version fetched has no statistics: then its counts only.

    >>> made = FetchedDataset(key="k" * 64, folder="/f", source="x.csv", revision="0" * 64, is_chat=True,
    ...                       num_train_rows=9, num_validation_rows=1, num_rejected_rows=0)
    >>> print(data_markdown(made, {}).splitlines()[-1])
    | rows | 9 | 1 | 0 |
    """
    head = f"""# Data set {dataset.source}

At `{dataset.revision[:16]}`, {"chats" if dataset.is_chat else "plain texts"}, in `{dataset.folder}`.

| | train | validation | rejected |
|---|---:|---:|---:|
| rows | {dataset.num_train_rows:,} | {dataset.num_validation_rows:,} | {dataset.num_rejected_rows:,} |
"""
    found = about.get("statistics")
    return head + _statistics_markdown(found) if found else head


def _statistics_markdown(found: dict[str, Any]) -> str:  # Any: JSON values
    lengths = found["characters"]
    lines = [
        "",
        f"A row has {lengths['median']:,} characters (median), the longest {lengths['longest']:,}; "
        f"{lengths['total']:,} in all.",
    ]
    if found["roles"]:
        roles = ", ".join(f"{role} {count:,}" for role, count in found["roles"].items())
        turns = ", ".join(f"{rows:,} with {count}" for count, rows in found["turns"].items())
        lines += ["", f"Messages: {roles}. Answers in a row: {turns}."]
    if found["rejected"]:
        lines += ["", "Rejected:", "", *(f"- {count:,}: {reason}" for reason, count in found["rejected"].items())]
    sample = found["sample"]
    said = [f"{message['role']}: {message['content']}" for message in sample.get("messages", [])] or [sample["text"]]
    lines += [
        "",
        f"The first row, {sample['row_id']}:",
        "",
        "````text",
        "\n".join(said)[:_SHOWN_CHARACTERS],
        "````",
        "",
    ]
    return "\n".join(lines)


def base_markdown(base: BaseCheckpoint, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return where a base came from and what it is made of.

    >>> base = BaseCheckpoint(key="k" * 64, folder="/f", model_folder="/m", origin="ada/base@0123",
    ...                       model_digest="d" * 64, num_parameters=20_914_757_184)
    >>> text = base_markdown(base, {"digests": {"config.json": "c" * 64}, "sizes": {"config.json": 1500}})
    >>> "20,914,757,184 parameters" in text, "| config.json | 1,500 | `cccccccccccccccc` |" in text
    (True, True)
    """
    digests, sizes = about.get("digests", {}), about.get("sizes", {})
    rows = [f"| {name} | {sizes.get(name, 0):,} | `{digest[:16]}` |" for name, digest in sorted(digests.items())]
    rest = f"\n\nand {len(rows) - _SHOWN_FILES} more" if len(rows) > _SHOWN_FILES else ""
    return (
        f"""# Base model {base.origin.partition("@")[0]}

| | |
|---|---|
| origin | {base.origin} |
| folder | `{base.model_folder}` |
| size | {base.num_parameters:,} parameters |
| digest | `{base.model_digest}` |

| file | bytes | sha256 |
|---|---:|---|
"""
        + "\n".join(rows[:_SHOWN_FILES])
        + rest
        + "\n"
    )
