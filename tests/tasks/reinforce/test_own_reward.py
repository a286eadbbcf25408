"""A user's own function: found, called by name, and told exactly what is wrong with it."""

import sys
from pathlib import Path

import pytest

from tasks.errors import SpecError, TrainingError
from tasks.reinforce.own import load_reward, source_digest
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec

SAID = [Said(question="q", answer="8", text=text, whole=text, num_tokens=1, is_finished=True) for text in ("8", "9")]
CODE = """
import math
def good(questions, completions, answers, bonus=0.0):
    return [float(c == a) + bonus for c, a in zip(completions, answers)]
def positional(texts): return [1.0 for _ in texts]
def too_few(questions, completions, answers): return [1.0]
def nan(questions, completions, answers): return [1.0, math.nan]
def text(questions, completions, answers): return ["good", "bad"]
def nothing(questions, completions, answers): return None
def broken(questions, completions, answers): return 1 / 0
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards_for_test.py").write_text(CODE)
    (tmp_path / "own_broken_for_test.py").write_text("raise RuntimeError('at import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_rewards_for_test", "own_broken_for_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "own_rewards_for_test.py"


def own(name: str, **arguments: float) -> RewardSpec:
    return RewardSpec(name=f"own_rewards_for_test:{name}", arguments=arguments)


def test_it_is_called_with_its_arguments():
    assert load_reward(own("good"))(SAID) == [1.0, 0.0]
    assert load_reward(own("good", bonus=0.5))(SAID) == [1.5, 0.5]
    assert own("good").column == "good"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_package_here:score", "can't be imported.*PYTHONPATH"),
        ("own_broken_for_test:score", "importing own_broken_for_test failed: RuntimeError: at import"),
        ("own_rewards_for_test:goood", "has no function 'goood'; it has: good, "),
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
        ("nan", "returned nan for completion 1"),
        ("text", "expected a list of numbers"),
        ("nothing", "returned None, expected a list of numbers"),
        ("broken", "failed: ZeroDivisionError"),
    ],
)
def test_what_it_returns_is_looked_at(name: str, says: str):
    with pytest.raises(TrainingError, match=says):
        load_reward(own(name))(SAID)


def test_an_edited_file_is_another_question(module: Path):
    before = source_digest(own("good"))
    module.write_text(CODE + "\n# edited\n")
    assert len(before) == 64 and source_digest(own("good")) != before
    assert source_digest(RewardSpec(name="exact")) == ""
