"""A user's own reward, named as package.module:function and loaded from the worker's path.

    def my_reward(questions: list[str], completions: list[str], answers: list[str], **arguments) -> list[float]

What goes wrong in it is a RewardError (a SpecError where it is known before the run) that names it, its line, what was
expected and the way out: whoever reads it wrote the function, and knows nothing of ours.

Ring: edge (imports what a person named).
"""

import functools
import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import RewardError, SpecError, TataraError
from tasks.reinforce.judge import Judge
from tasks.reinforce.rewards import RewardFn, make_reward
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec

_LONGEST = 500  # characters of what a user's code says
_MOST = 1e18  # TRL squares scores in float32 for their spread: above, all advantages would be 0 or NaN


def load_reward(spec: RewardSpec) -> RewardFn:
    """Return the reward that a recipe names: ours, the judge, or a user's own. Raises SpecError."""
    if spec.name == "judge":
        return Judge.from_arguments(spec.arguments)
    if ":" not in spec.name:
        return make_reward(spec)
    function = import_function(spec.name)
    _require_plain(function, spec.name)
    _require_signature(function, spec)

    def score(batch: Sequence[Said]) -> list[float]:
        asked = {
            "questions": [said.question for said in batch],
            "completions": [said.text for said in batch],
            "answers": [said.answer for said in batch],
        }
        arguments = deepcopy(spec.arguments)  # a function that changes them must not change the next step
        return require_scores(_call(function, asked | arguments, spec.name), batch, spec.name)

    return score


def _call(function: Callable[..., Any], asked: dict[str, Any], name: str) -> Any:  # Any: a user's function and values
    """Return what a user's function gives, as a list where it gives one by one. Raises RewardError."""
    try:
        given = function(**asked)
        most = len(asked["questions"]) + 1  # one may go on for ever
        return list(islice(given, most)) if isinstance(given, Iterator) else given
    except TataraError:
        raise
    except SystemExit as error:
        raise RewardError(
            f"your reward {name} ended the process (sys.exit({error.code!r}){_line(error, function)}): raise an "
            "exception that says what is wrong, or return 0.0 for a completion that is worth nothing"
        ) from error
    except Exception as error:
        raise RewardError(
            f"your reward {name} failed: {type(error).__name__}: {str(error)[:_LONGEST]}{_line(error, function)}: mend "
            "it, or catch that and return 0.0 for a completion that is worth nothing"
        ) from error


def require_scores(given: Any, batch: Sequence[Said], name: str) -> list[float]:  # Any: whatever a function returns
    """Return a reward's scores as floats. Raises RewardError for a wrong number of them, or one that is no number."""
    expected = f"expected a list of numbers, one for each of {len(batch)} completions in their order"
    if inspect.iscoroutine(given):
        given.close()
        raise RewardError(f"reward {name} returned a coroutine, {expected}: {_ASYNC}")
    if isinstance(given, (str, bytes, Mapping, Set)):  # of these a loop would make something else
        raise RewardError(f"reward {name} returned a {type(given).__name__} ({given!r:.200}), {expected}")
    try:
        values = list(given)
    except TypeError as error:
        raise RewardError(f"reward {name} returned {given!r:.200}, {expected}") from error
    if len(values) != len(batch):
        raise RewardError(f"reward {name} returned {len(values)} scores for {len(batch)} completions: {expected}")
    return [_require_number(value, place, batch[place], name) for place, value in enumerate(values)]


def _require_number(value: Any, place: int, said: Said, name: str) -> float:  # Any: as above
    try:
        score = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        score = math.nan
    if not abs(score) <= _MOST:
        raise RewardError(
            f"reward {name} returned {value!r:.200} for completion {place} ({said.text[:60]!r}, asked "
            f"{said.question[:60]!r}), expected a finite number (of {_MOST:.0e} at most): return 0.0 for a completion "
            "that is worth nothing"
        )
    return score


def import_function(name: str) -> Callable[..., Any]:  # Any: a user's function
    """Import package.module:function. Raises SpecError that says which part is not there."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):  # found, but not what it needs
            raise SpecError(
                f"reward {name}: {module_name} imports what can't be imported ({error}): install {error.name} in the "
                "worker's environment, or put its folder on PYTHONPATH of the Prefect worker"
            ) from error
        raise SpecError(
            f"reward {name}: {module_name} can't be imported ({error}): put its folder on PYTHONPATH of the Prefect "
            "worker, or install it in the worker's environment"
        ) from error
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {str(error)[:_LONGEST]}"
        raise SpecError(
            f"reward {name}: importing {module_name} failed: {said}; see that `python -c 'import {module_name}'` works"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        has = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        there = (
            f"{function_name!r} is of type {type(function).__name__} and no function" if function is not None else ""
        )
        raise SpecError(
            f"reward {name}: {module_name} has no function {function_name!r}; it has: {has}{there and f' ({there})'}"
        )
    return function


def source_digest(spec: RewardSpec) -> str:
    """Return the sha256 of the file of a user's own reward: an edited file is another run.

    "" for one of ours, and for one without a file of Python.
    """
    if ":" not in spec.name:
        return ""
    found = _source(import_function(spec.name))
    return files.digest(Path(found)) if found else ""


def _source(function: Callable[..., Any]) -> str:  # Any: as above
    """Return the file of a function, of what a partial calls, of an object's class; "" where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return inspect.getsourcefile(function if inspect.isroutine(function) else type(function)) or ""
    except TypeError:  # built in
        return ""


def _line(error: BaseException, function: Callable[..., Any]) -> str:  # Any: as above
    """Return where in a user's file an error came from, "" where it can't be told."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    own = [frame for frame in frames if frame.filename == _source(function)] or frames
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


_ASYNC = "make it a plain function, which may call asyncio.run itself"


def _require_plain(function: Callable[..., Any], name: str) -> None:  # Any: as above
    called = (function, type(function).__call__)  # of an object with __call__ that is what runs
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in called):
        raise SpecError(f"reward {name} is async, and nobody awaits it: {_ASYNC}")
    if inspect.isclass(function):
        raise SpecError(
            f"reward {name} is a class: calling it makes an object and no scores; name a function, or an object of it "
            "with __call__ that the module holds"
        )


def _require_signature(function: Callable[..., Any], spec: RewardSpec) -> None:  # Any: as above
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some that are built in nobody knows it
        return
    try:
        signature.bind(questions=[], completions=[], answers=[], **spec.arguments)
    except TypeError as error:
        raise SpecError(
            f"reward {spec.name}{signature} can't be called with questions, completions, answers"
            f"{''.join(f', {name}' for name in spec.arguments)} by name: {error}"
        ) from error
