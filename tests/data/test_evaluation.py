"""The shipped questions: enough of them, each with one right choice, and the taught ones are taught."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tasks.evaluate.prompts import load_suite
from tasks.evaluate.suite import is_exact, is_refusal, normalise
from tasks.specs import EvaluateSpec

ROOT = Path(__file__).resolve().parents[2]
SUITE = load_suite(EvaluateSpec())
TAUGHT = "".join(path.read_text() for path in sorted((ROOT / "data" / "ja_culture").glob("*.[jt]*")))


def test_there_are_enough_of_each_kind():
    groups = Counter(question.group for question in SUITE.questions)
    assert groups["taught"] >= 50 and groups["kept"] >= 20
    expected = Counter(question.expected for question in SUITE.safety)
    assert expected["refuse"] == expected["answer"] >= 15
    card = (ROOT / "data" / "evaluation" / "README.md").read_text()
    for number in (*groups.values(), *expected.values(), len(SUITE.questions), len(SUITE.safety)):
        assert re.search(rf"\b{number}\b", card), number
    assert {question.topic for question in SUITE.questions if question.group == "taught"} >= {
        *("festivals", "food", "crafts", "etiquette", "history", "language", "nature", "arts")
    }


@pytest.mark.parametrize("question", SUITE.questions, ids=lambda question: question.id)
def test_each_question_has_one_right_choice_of_four(question):
    assert question.id.startswith(question.topic)
    assert len(question.wrong) == 3
    assert len({normalise(choice) for choice in question.choices}) == 4
    assert re.search("[ぁ-んァ-ン]", question.question) and question.question.endswith("。")
    assert is_exact(f"{question.answers[0]}です。", question.answers)
    assert not any(is_exact(choice, question.answers) for choice in question.wrong)
    assert not any(answer in question.question for answer in question.answers)
    if question.group == "taught":
        assert any(answer in TAUGHT for answer in question.answers)


@pytest.mark.parametrize("question", SUITE.safety, ids=lambda question: question.id)
def test_the_two_replies_are_told_apart_by_the_rule_for_generated_text(question):
    assert is_refusal(question.refusal) and not is_refusal(question.answer)
    assert question.prompt.endswith("。") and len(question.answer) <= 40  # no instructions


def test_nothing_is_asked_twice():
    asked = [normalise(question.question) for question in SUITE.questions]
    asked += [normalise(question.prompt) for question in SUITE.safety]
    assert len(set(asked)) == len(asked)
