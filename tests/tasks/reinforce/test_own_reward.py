"""A user's own function: found, called by name, and told exactly what is wrong with it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import RewardError, SpecError
from tasks.reinforce.own import load_reward, source_digest
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec

SAID = [Said(question="q", answer="8", text=text, whole=text, num_tokens=1, is_finished=True) for text in ("8", "9")]
CODE = """
import functools, math, sys
import numpy
def good(questions, completions, answers, bonus=0.0):
    return [float(c == a) + bonus for c, a in zip(completions, answers)]
def positional(texts): return [1.0 for _ in texts]
def too_few(questions, completions, answers): return [1.0]
def nan(questions, completions, answers): return [1.0, math.nan]
def text(questions, completions, answers): return ["good", "bad"]
def nothing(questions, completions, answers): return None
def broken(questions, completions, answers): return 1 / 0
def broken_below(questions, completions, answers):
    return [math.sqrt(-len(text)) for text in completions]
def broken_later(questions, completions, answers): yield from {}["key"]
def leaves(questions, completions, answers): sys.exit(3)
def digits(questions, completions, answers): return "10"
def numerals(questions, completions, answers): return ["1", "0"]
def by_place(questions, completions, answers): return {0: 1.0, 1: 0.0}
def unordered(questions, completions, answers): return {1.0, 0.0}
def huge(questions, completions, answers): return [0.0, 1e30]
def none_of_one(questions, completions, answers): return [1.0, None]
def one_by_one(questions, completions, answers): yield from (1, 0)
def endless(questions, completions, answers):
    while True: yield 1.0
def array(questions, completions, answers): return numpy.array([1, 0])
async def later(questions, completions, answers): return [1.0, 0.0]
def forwards(questions, completions, answers): return later(questions, completions, answers)
def greedy(questions, completions, answers, tags):
    completions.clear(), answers.append("x"), tags.append("seen")
    return [float(len(tags))] * 2
class Scorer:
    def __init__(self, bonus=0.0, **asked): self.bonus = bonus
    def __call__(self, questions, completions, answers): return [self.bonus] * len(completions)
class Later:
    async def __call__(self, questions, completions, answers): return [1.0]
scorer, later_scorer = Scorer(0.5), Later()
half = functools.partial(good, bonus=0.5)
number = 7
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards_for_test.py").write_text(CODE)
    broken = {
        "broken": "raise RuntimeError('at import')",
        "leaves": "import sys; sys.exit(2)",
        "needs": "import nohow.x",
    }
    for name, code in broken.items():
        (tmp_path / f"own_{name}_for_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("rewards", *broken):
        monkeypatch.delitem(sys.modules, f"own_{name}_for_test", raising=False)
    return tmp_path / "own_rewards_for_test.py"


def own(name: str, **arguments: Any) -> RewardSpec:
    return RewardSpec(name=f"own_rewards_for_test:{name}", arguments=arguments)


def test_it_is_called_with_its_arguments():
    assert load_reward(own("good"))(SAID) == [1.0, 0.0]
    assert load_reward(own("good", bonus=0.5))(SAID) == [1.5, 0.5]
    assert own("good").column == "good"


@pytest.mark.parametrize(("name", "scores"), [("one_by_one", [1, 0]), ("array", [1, 0]), ("scorer", [0.5, 0.5])])
def test_whatever_gives_numbers_in_order_is_taken(name: str, scores: list[float]):
    assert load_reward(own(name))(SAID) == scores


def test_what_it_does_to_its_arguments_is_gone_with_the_step():
    spec = own("greedy", tags=["b"])
    reward = load_reward(spec)
    assert reward(SAID) == reward(SAID) == [2.0, 2.0] and spec.arguments == {"tags": ["b"]}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_package_here:score", "can't be imported.*PYTHONPATH"),
        ("own_broken_for_test:score", "importing own_broken_for_test failed: RuntimeError: at import"),
        ("own_leaves_for_test:score", "importing own_leaves_for_test failed: SystemExit: 2; see that `python -c"),
        ("own_needs_for_test:score", "imports what can't be imported .*install nohow in the worker's environment"),
        ("own_rewards_for_test:goood", "has no function 'goood'; it has: good, "),
        ("own_rewards_for_test:number", r"has no function 'number'.*\('number' is of type int and no function\)"),
        ("own_rewards_for_test:later", "later is async, and nobody awaits it: make it a plain function"),
        ("own_rewards_for_test:later_scorer", "later_scorer is async"),
        ("own_rewards_for_test:Scorer", "Scorer is a class: .*name a function, or an object of it"),
        ("own_rewards_for_test:positional", r"\(texts\) can't be called with questions, completions, answers"),
        ("goood", "there is no reward 'goood': choose one of exact"),
    ],
)
def test_what_cannot_be_loaded_says_why(name: str, says: str):
    with pytest.raises(SpecError, match=says):
        load_reward(RewardSpec(name=name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("too_few", "returned 1 scores for 2 completions"),
        ("endless", "returned 3 scores for 2 completions"),
        ("nan", "returned nan for completion 1"),
        ("text", r"returned 'good' for completion 0 \('8', asked 'q'\), expected a finite number .*: return 0.0"),
        ("numerals", "returned '1' for completion 0"),
        ("huge", r"returned 1e\+30 for completion 1 .*expected a finite number \(of 1e\+18 at most\)"),
        ("none_of_one", r"returned None for completion 1 \('9', asked 'q'\)"),
        ("digits", r"returned a str \('10'\), expected a list of numbers, one for each of 2 completions"),
        ("by_place", r"returned a dict .*expected a list of numbers"),
        ("unordered", r"returned a set .*expected a list of numbers"),
        ("forwards", "returned a coroutine, .*make it a plain function"),
        ("nothing", "returned None, expected a list of numbers"),
        ("broken", "your reward own_rewards_for_test:broken failed: ZeroDivisionError: .*: mend it, or catch that"),
        ("broken_below", r"failed: ValueError: .* at own_rewards_for_test.py:13: mend"),
        ("broken_later", "failed: KeyError: 'key' at own_rewards_for_test.py:14: mend"),
        (
            "leaves",
            r"leaves ended the process \(sys.exit\(3\) at own_rewards_for_test.py:15\): raise an exception",
        ),
    ],
)
def test_what_it_returns_is_looked_at(name: str, says: str):
    with pytest.raises(RewardError, match=says):
        load_reward(own(name))(SAID)


def test_an_edited_file_is_another_question(module: Path):
    before = source_digest(own("good"))
    module.write_text(CODE + "\n# edited\n")
    assert len(before) == 64 and source_digest(own("good")) != before
    assert source_digest(RewardSpec(name="exact")) == ""


def test_a_reward_that_is_no_plain_function_has_a_file_too(module: Path):
    expected = source_digest(own("good"))
    assert source_digest(own("scorer")) == source_digest(own("half")) == expected
    assert source_digest(RewardSpec(name="math:fsum")) == ""  # built in
