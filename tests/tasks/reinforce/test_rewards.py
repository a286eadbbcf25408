"""Every reward stays in its range, whatever a model says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import SpecError
from tasks.reinforce.rewards import REWARDS, last_number, make_reward
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec

ARGUMENTS = {
    "number": {"partial": 0.5, "scale": 5.0},
    "format": {"tags": ["think", "answer"]},
    "characters": {"pattern": "[0-9]"},
    "length": {"most": 5, "least": 2},
}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("0123456789一二十百千.,-−<>/thinkanswer 。", max_size=60),
    st.sampled_from(["一" * 400, "9" * 5000, "千" * 400, "-", "−"]),
)


@pytest.mark.parametrize("name", sorted(REWARDS))
@given(text=TEXTS)
def test_a_reward_is_within_0_and_1(name: str, text: str):
    said = Said(question="3+5?", answer="8", text=text, whole=text, num_tokens=1, is_finished=False)
    [score] = make_reward(RewardSpec(name=name, arguments=ARGUMENTS.get(name, {})))([said])
    assert 0.0 <= score <= 1.0, (text, score)


@given(st.integers(0, 9999))
def test_a_number_is_read_as_it_is_written(value: int):
    numerals = "〇一二三四五六七八九"
    kanji = "".join(numerals[int(digit)] for digit in str(value))
    for text in (
        f"答えは{value}です",
        f"{value:,}",
        kanji,
        str(value).translate(str.maketrans("0123456789", "０１２３４５６７８９")),
    ):
        assert last_number(text) == value, text


def test_numerals_without_an_end_are_no_fault():
    assert last_number("一" * 400) == math.inf


@pytest.mark.parametrize(
    ("name", "arguments"), [("number", {"scale": 0.0}), ("number", {"partial": "x"}), ("length", {"most": 0})]
)
def test_an_argument_that_fails_later_is_refused_now(name: str, arguments: dict[str, object]):
    with pytest.raises(SpecError, match=f"reward '{name}' can't work with"):
        make_reward(RewardSpec(name=name, arguments=arguments))
