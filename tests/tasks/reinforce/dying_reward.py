"""A user's reward that ends its process without a word, once: between two steps' checkpoints, at no clock's mercy."""

import os
import signal
from pathlib import Path


def score(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Score nothing; SIGKILL the trainer once the checkpoint that `DIES_AFTER` names (below its folder) is whole."""
    home, _, checkpoint = os.environ.get("DIES_AFTER", "").rpartition(":")
    if home and any(Path(home).rglob(f"{checkpoint}/trainer_state.json")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)
