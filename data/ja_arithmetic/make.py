"""Make ja_arithmetic_q_dataset.csv: sums and differences of small numbers, asked in Japanese.

python data/ja_arithmetic/make.py          writes the file; the same bytes each time
"""

import csv
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILE = HERE / "ja_arithmetic_q_dataset.csv"
SUMS = (
    "{a}たす{b}はいくつですか？",
    "{a}と{b}を足すといくつになりますか？",
    "りんごが{a}個あり、{b}個もらいました。全部で何個ですか？",
)
DIFFERENCES = (
    "{a}ひく{b}はいくつですか？",
    "{a}から{b}を引くといくつになりますか？",
    "あめが{a}個あり、{b}個食べました。残りは何個ですか？",
)


def rows() -> list[tuple[str, str]]:
    """Return every question once, in a fixed order, with its answer."""
    made = []
    for a in range(1, 10):
        for b in range(1, 10):
            made += [(words.format(a=a, b=b), str(a + b)) for words in SUMS]
            if b <= a:
                made += [(words.format(a=a, b=b), str(a - b)) for words in DIFFERENCES]
    random.Random(0).shuffle(made)  # noqa: S311
    return made


def main() -> None:
    """Write the file."""
    with FILE.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("question", "answer"))
        writer.writerows(rows())


if __name__ == "__main__":
    main()
