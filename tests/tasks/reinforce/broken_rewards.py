"""Rewards as people write them, and what goes wrong in them; each is called once a step."""

import os
import signal
import sys
import time
from pathlib import Path

_calls: list[int] = []


def digits(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Prefer digits."""
    del questions, answers
    return [sum(map(str.isdecimal, text)) / max(1, len(text)) for text in completions]


def fail_at_once(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Fail in the first step."""
    raise ValueError(f"no score for {len(questions) + len(completions) + len(answers)} texts")


def fail_in_the_fourth(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Fail in the fourth step of a process, unless a file says that whatever it was has been mended."""
    _calls.append(len(completions))
    if len(_calls) == 4 and not Path(os.environ["MENDED"]).exists():
        raise LookupError("the price list is not there: \ud83d")  # half an emoji
    return digits(questions, completions, answers)


def leave(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """End the process as a script would."""
    sys.exit(2)


def die(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """End the process as a crash would."""
    os._exit(7)


def die_after_a_checkpoint(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Score nothing; SIGKILL the process once the checkpoint that DIES_AFTER (`folder:name`) says is whole."""
    folder, _, name = os.environ.get("DIES_AFTER", "").rpartition(":")
    if folder and any(Path(folder).rglob(f"{name}/trainer_state.json")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)


def hang(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Wait for what never comes."""
    time.sleep(600)
    return digits(questions, completions, answers)


def talk(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Print a lot, take a while, and change what was given."""
    for number in range(2000):
        sys.stdout.write(f"{number}: {completions[0]!r}{'x' * 500}\n")
    sys.stdout.write("y" * 3_000_000)
    time.sleep(3)
    scores = digits(questions, completions, answers)
    for each in (questions, completions, answers):
        each.clear()
    return scores
