"""Write train.jsonl and test.jsonl: word problems in GSM8K's form, whose arithmetic is computed, not written by hand.

python data/word_problems/generate.py        # the same files each time
"""

import json
import random
from pathlib import Path

NAMES = ("Aiko", "Ben", "Chika", "Daniel", "Emi", "Farid", "Grace", "Haruto", "Ines", "Jun")
GOODS = ("apples", "books", "cards", "eggs", "pencils", "stones", "stamps", "tickets")
NUM_TRAIN, NUM_TEST = 256, 32


def problem(rng: random.Random) -> dict[str, str]:
    """Return one question and its worked answer; each <<a=b>> is checked by the test beside the tests of PPO."""
    name, other = rng.sample(NAMES, 2)
    goods = rng.choice(GOODS)
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    c = rng.randint(1, min(9, a * b - 1))  # something is left
    kind = rng.randrange(4)
    if kind == 0:
        return {
            "question": f"{name} has {a} {goods}. {other} gives {name} {b} more. "
            f"How many {goods} does {name} have now?",
            "answer": f"{name} now has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {goods}.\n#### {a + b}",
        }
    if kind == 1:
        return {
            "question": f"{name} buys {a} boxes with {b} {goods} in each. How many {goods} are that?",
            "answer": f"There are {a}*{b}=<<{a}*{b}={a * b}>>{a * b} {goods}.\n#### {a * b}",
        }
    if kind == 2:
        total = a * b
        return {
            "question": f"{name} shares {total} {goods} equally among {a} friends. How many does each friend get?",
            "answer": f"Each friend gets {total}/{a}=<<{total}/{a}={b}>>{b} {goods}.\n#### {b}",
        }
    left = a * b - c
    return {
        "question": f"{name} fills {a} bags with {b} {goods} each and gives {c} away to {other}. How many are left?",
        "answer": f"In the bags are {a}*{b}=<<{a}*{b}={a * b}>>{a * b} {goods}.\n"
        f"Then {a * b}-{c}=<<{a * b}-{c}={left}>>{left} are left.\n#### {left}",
    }


def main() -> None:
    """Write both files; no question is in both or twice."""
    rng, seen, rows = random.Random(0), set(), []  # noqa: S311 - no secret
    while len(rows) < NUM_TRAIN + NUM_TEST:
        made = problem(rng)
        if made["question"] not in seen:
            seen.add(made["question"])
            rows.append(made)
    for name, part in (("train", rows[:NUM_TRAIN]), ("test", rows[NUM_TRAIN:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
