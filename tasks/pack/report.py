"""What a person wants to see of a packed data set, as Markdown.

Ring: pure.
"""

from statistics import median
from typing import Any

from tasks.artifacts import PackedDataset


def length_stats(lengths: list[int]) -> dict[str, float]:
    """Return count, total, median and largest length in tokens.

    >>> length_stats([1, 2, 9])
    {'count': 3, 'total': 12, 'median': 2, 'max': 9}
    """
    return {
        "count": len(lengths),
        "total": sum(lengths),
        "median": median(lengths) if lengths else 0,
        "max": max(lengths, default=0),
    }


def packing_markdown(packed: PackedDataset, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return the data and packing statistics with one rendered sample, learnt tokens marked."""
    stats = about["lengths"]
    return f"""# Packed data set {packed.short}

| | train | validation |
|---|---:|---:|
| documents | {packed.num_train_documents} | {packed.num_validation_documents} |
| rows of {packed.row_tokens} tokens | {packed.num_train_rows} | {packed.num_validation_rows} |
| tokens | {stats["train"]["total"]:,} | {stats["validation"]["total"]:,} |
| median / longest document | {stats["train"]["median"]} / {stats["train"]["max"]} | \
{stats["validation"]["median"]} / {stats["validation"]["max"]} |

{packed.num_learnt_tokens:,} of {packed.num_train_tokens:,} training tokens are learnt; rows are \
{packed.fill_pct:.1f} % full; {about["num_dropped"]} documents were dropped as too long.

One document: what the model is asked, and **what it learns to say** in the second block.

```text
{about["sample"]["prompt"]}
```

```text
{about["sample"]["answer"]}
```
"""
