"""What the lite model takes, and how it says what it does not."""

import pytest

from deployments.lite.asked import CHAT, COMPLETIONS, AskError, read_wish

SAY = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_chat_is_read():
    more = {"max_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["a", "b"], "stream": True}
    wish = read_wish(CHAT, SAY | more | {"stream_options": {"include_usage": True}, "user": "unknown fields are left"})
    assert (wish.messages, wish.max_tokens, wish.temperature, wish.top_p) == (SAY["messages"], 7, 0.0, 0.5)
    assert (wish.seed, wish.stop, wish.streams, wish.with_usage) == (3, ("a", "b"), True, True)
    assert read_wish(CHAT, SAY | {"max_completion_tokens": 5, "max_tokens": 9}).max_tokens == 5


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_wish(CHAT, {"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [1, 2], [[1, 2]]])
def test_prompts(prompt):
    assert read_wish(COMPLETIONS, {"prompt": prompt}).prompt in ("hi", [1, 2])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, [], "no JSON object"),
        (CHAT, {}, "'messages' is no list"),
        (CHAT, {"messages": [{"content": "x"}]}, r"messages\[0\] is no object with a 'role'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "more than text"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "has no text"),
        (CHAT, SAY | {"tools": [{}]}, "knows no 'tools'"),
        (CHAT, SAY | {"n": 2}, "n=2: the lite model gives one answer"),
        (CHAT, SAY | {"temperature": -1}, "temperature=-1: expected 0..2"),
        (CHAT, SAY | {"temperature": True}, "temperature=True"),
        (CHAT, SAY | {"top_p": 0}, "top_p=0: expected more than 0"),
        (CHAT, SAY | {"max_tokens": 0}, "max_tokens=0: expected a whole number from 1"),
        (CHAT, SAY | {"seed": 1.5}, "seed=1.5"),
        (CHAT, SAY | {"stop": [1]}, "'stop' is neither"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "'prompt' is neither"),
        (COMPLETIONS, {"prompt": [-1]}, "'prompt' is neither"),
        (COMPLETIONS, {"prompt": ""}, None),
    ],
)
def test_what_is_wrong_is_named(path, body, message):
    if message is None:
        assert read_wish(path, body).prompt == ""
        return
    with pytest.raises(AskError, match=message):
        read_wish(path, body)
