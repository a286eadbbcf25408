"""A user's own reward, named as package.module:function and loaded from the worker's path.

    def my_reward(questions: list[str], completions: list[str], answers: list[str], **arguments) -> list[float]

Ring: edge (imports what a person named).
"""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import SpecError, TataraError, TrainingError
from tasks.reinforce.judge import Judge
from tasks.reinforce.rewards import RewardFn, make_reward
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec


def load_reward(spec: RewardSpec) -> RewardFn:
    """Return the reward that a recipe names: ours, the judge, or a user's own. Raises SpecError."""
    if spec.name == "judge":
        return Judge.from_arguments(spec.arguments)
    if ":" not in spec.name:
        return make_reward(spec)
    function = import_function(spec.name)
    _require_signature(function, spec)

    def score(batch: Sequence[Said]) -> list[float]:
        asked = {
            "questions": [said.question for said in batch],
            "completions": [said.text for said in batch],
            "answers": [said.answer for said in batch],
        }
        try:
            given = function(**asked, **spec.arguments)
        except TataraError:
            raise
        except Exception as error:
            raise TrainingError(f"your reward {spec.name} failed: {type(error).__name__}: {error}") from error
        return require_scores(given, len(batch), spec.name)

    return score


def require_scores(given: Any, expected: int, name: str) -> list[float]:  # Any: whatever a user's function returns
    """Return a reward's scores as floats. Raises TrainingError for a wrong number of them, or one that is no number."""
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError) as error:
        raise TrainingError(f"reward {name} returned {given!r:.200}, expected a list of numbers") from error
    if len(scores) != expected:
        raise TrainingError(f"reward {name} returned {len(scores)} scores for {expected} completions: one for each")
    wrong = [place for place, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise TrainingError(
            f"reward {name} returned {scores[wrong[0]]} for completion {wrong[0]}: a score must be finite; return 0.0 "
            "for a completion that is worth nothing"
        )
    return scores


def import_function(name: str) -> Callable[..., Any]:  # Any: a user's function
    """Import package.module:function. Raises SpecError that says which part is not there."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(
            f"reward {name}: {module_name} can't be imported ({error}): put its folder on PYTHONPATH of the Prefect "
            "worker, or install it in the worker's environment"
        ) from error
    except Exception as error:
        raise SpecError(f"reward {name}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        has = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise SpecError(f"reward {name}: {module_name} has no function {function_name!r}; it has: {has}")
    return function


def source_digest(spec: RewardSpec) -> str:
    """Return the sha256 of the file of a user's own reward, "" for one of ours: an edited file is another run."""
    if ":" not in spec.name:
        return ""
    found = inspect.getsourcefile(import_function(spec.name))
    return files.digest(Path(found)) if found else ""


def _require_signature(function: Callable[..., Any], spec: RewardSpec) -> None:  # Any: a user's function
    try:
        inspect.signature(function).bind(questions=[], completions=[], answers=[], **spec.arguments)
    except TypeError as error:
        raise SpecError(
            f"reward {spec.name}{inspect.signature(function)} can't be called with questions, completions, answers"
            f"{''.join(f', {name}' for name in spec.arguments)} by name: {error}"
        ) from error
