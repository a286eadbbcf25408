"""Greedy tokens must be transformers', up to a tie that rounding may turn."""

import pytest

from tasks.errors import AttestationError, CorruptError
from tasks.verify import greedy as subject
from tasks.verify.greedy import GreedyStep


def _steps(*leads: float) -> list[GreedyStep]:
    return [GreedyStep(token=10 + i, second=20 + i, lead=lead) for i, lead in enumerate(leads)]


def test_equal_answers_are_compared_to_their_end():
    assert subject.compare_greedy([10, 11, 12], _steps(1, 1, 1), "float32") == 3


@pytest.mark.parametrize(("dtype", "tie"), list(subject.TIES.items()))
def test_a_near_tie_ends_the_comparison_and_a_clear_lead_fails(dtype: str, tie: float):
    assert subject.compare_greedy([10, 21, 99], _steps(1, tie, 1), dtype) == 2  # what follows is another text
    with pytest.raises(AttestationError, match=r"greedy token 1 is 21, the merged files' is 11 with a lead of"):
        subject.compare_greedy([10, 21, 99], _steps(1, tie * 1.1, 1), dtype)


def test_a_third_token_is_no_tie():
    with pytest.raises(AttestationError, match="greedy token 0 is 99"):
        subject.compare_greedy([99], _steps(0.0), "bfloat16")


def test_an_answer_that_ends_early_fails():
    with pytest.raises(AttestationError, match="ends after 1 tokens, the merged files' goes on to 2"):
        subject.compare_greedy([10], _steps(1, 1), "float32")


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"token_ids": None}]}, {"choices": [{"token_ids": []}]}])  # fmt: skip  # noqa: E501
def test_a_reply_without_tokens_is_refused(reply: dict):
    with pytest.raises(CorruptError, match=r"returned no token ids for a greedy answer .*is it vLLM\?"):
        subject.greedy_tokens(reply)
