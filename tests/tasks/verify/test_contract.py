"""The contract of a chat: what goes in is the template's, what comes out is parsed, the end is a true one."""

import pytest

from tasks.errors import AttestationError
from tasks.verify import contract as subject


def test_the_prompt_is_the_templates_but_for_the_date():
    subject.check_prompt("<|start|>system\nCurrent date: 2026-11-21<|end|>", "<|start|>system\nCurrent date: 2026-11-22<|end|>")  # fmt: skip  # noqa: E501
    with pytest.raises(AttestationError, match="the server puts 'Reasoning: high' before the model"):
        subject.check_prompt("Reasoning: high", "Reasoning: medium")


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("marker", [*subject.MARKERS, "<|mine|>"])
def test_a_marker_in_what_a_person_reads_fails(name: str, marker: str):
    message = {"content": "fine", name: f"analysis{marker}well"}
    with pytest.raises(AttestationError, match=f"the answer's {name} holds") as caught:
        subject.check_message(message, ["<|mine|>"])
    assert marker in str(caught.value)


def test_a_parsed_answer_passes():
    subject.check_message({"content": "a | b < c", "reasoning_content": None}, ["<|mine|>"])


@pytest.mark.parametrize(
    ("reason", "num_tokens", "passes"),
    [
        *[("stop", 3, True), ("stop", 8, True), ("length", 8, True), ("tool_calls", 5, True)],
        *[("length", 7, False), ("stop", 9, False), (None, 3, False), ("abort", 3, False)],
    ],
)
def test_the_end_is_the_one_that_the_tokens_say(reason: str | None, num_tokens: int, passes: bool):
    if passes:
        subject.check_end(reason, num_tokens, 8)
    else:
        with pytest.raises(AttestationError):
            subject.check_end(reason, num_tokens, 8)


def test_another_tokenizer_is_told():
    subject.check_text_ids([1, 2], [1, 2])
    for ids in ([1, 3], None, [1]):
        with pytest.raises(AttestationError, match="a stale tokenizer is served"):
            subject.check_text_ids(ids, [1, 2])
