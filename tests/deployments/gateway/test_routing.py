import json

import pytest

from deployments.gateway.routing import CHAT, COMPLETIONS, GENERATE, BadRequestError, plan_routes, read_ask
from deployments.gateway.settings import Settings

LITE = Settings(lite_model="http://lite")


def ask(body, endpoint=CHAT):
    return read_ask(endpoint, json.dumps(body).encode())


def user(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def routes(ask_, settings):
    return [(choice.route, choice.reason) for choice in plan_routes(ask_, settings)]


def test_a_short_prompt_goes_to_lite_and_to_vllm_when_lite_is_down():
    expected = [("lite", "short-prompt"), ("vllm", "lite-down"), ("maintenance", "vllm-down")]
    assert routes(ask(user("あ" * 120)), LITE) == expected
    assert routes(ask({"prompt": "hi"}, COMPLETIONS), LITE) == expected
    assert routes(ask({"input": "hi"}, GENERATE), LITE) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (user("あ" * 121), "long-prompt"),
        (user("hi", tools=[{"type": "function"}]), "tools"),
        (user("hi", logprobs=True), "logprobs"),
        (user("hi", response_format={"type": "json_object"}), "response-format"),
        (user("hi", stream_options={"include_usage": True}), "stream-options"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]}, "history"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "history"),
        ({"messages": "hi"}, "history"),
    ],
)
def test_what_a_small_model_should_not_get_goes_to_vllm(body, reason):
    assert routes(ask(body), LITE) == [("vllm", reason), ("lite", "vllm-down"), ("maintenance", "vllm-down")]


def test_without_a_lite_model_a_short_prompt_is_answered_by_vllm():
    assert routes(ask(user("hi")), Settings()) == [("vllm", "no-lite-model"), ("maintenance", "vllm-down")]


def test_lite_canned_brings_the_first_gateways_behaviour_back():
    assert routes(ask(user("hi")), Settings(lite_canned=True)) == [("maintenance", "short-prompt")]
    assert routes(ask(user("あ" * 121)), Settings(lite_canned=True))[0] == ("vllm", "long-prompt")


def test_without_fallback_a_dead_vllm_is_an_error():
    assert routes(ask(user("hi")), Settings(fallback=False))[-1] == ("none", "vllm-down")


def test_generate_becomes_a_chat_and_keeps_unknown_fields():
    made = ask({"model": "m", "input": "こんにちは", "max_tokens": 8, "new_knob": 1}, GENERATE)
    assert made.path == CHAT
    assert json.loads(made.raw) == user("こんにちは", model="m", max_tokens=8, new_knob=1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "JSON list"),
        (b'{"temperature": NaN}', "NaN is no JSON value"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_an_unreadable_body_is_refused_with_the_reason(raw, message):
    with pytest.raises(BadRequestError, match=message):
        read_ask(CHAT, raw)


def test_generate_without_text_is_refused():
    with pytest.raises(BadRequestError, match="'input' or 'prompt'"):
        ask({"model": "m", "input": ["a"]}, GENERATE)
