import json
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.traces.stream import StreamAssembler

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two shared cores


def sse(*events, end="\n"):
    return "".join(
        f"data: {event if isinstance(event, str) else json.dumps(event)}{end}{end}" for event in events
    ).encode()


def assembled(pieces, limit_bytes=1 << 20):
    assembler = StreamAssembler(limit_bytes)
    for piece in pieces:
        assembler.feed(piece)
    assembler.finish()
    return assembler.answer(), assembler.stats(), assembler.error


def delta(index=0, finish=None, **fields):
    return {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


CALLS = sse(
    delta(role="assistant", content=None),
    delta(tool_calls=[{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]),
    delta(tool_calls=[{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x"'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}, {"index": 1, "function": {"arguments": "{}"}}]),
    delta(finish="tool_calls"),
    {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 9}},
    "[DONE]",
)


def test_a_chat_with_tool_calls_reasoning_and_usage_becomes_whole():
    answer, stats, error = assembled([sse(delta(reasoning_content="考"), delta(reasoning_content="え")) + CALLS])
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"total_tokens": 9}
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "考え"
    assert choice["message"]["tool_calls"] == [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert (stats, error) == ({"chunks": 8, "malformed": 0, "done": True, "truncated": False}, None)


def test_completions_choices_and_logprobs_are_joined():
    events = [
        {"object": "text_completion", "choices": [{"index": i, "text": t, "logprobs": {"tokens": [t]}}]}
        for i, t in ((0, "a"), (1, "x"), (0, "b"))
    ]
    answer, _, _ = assembled([sse(*events)])
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "x"]
    assert answer["choices"][0]["logprobs"] == {"tokens": ["a", "b"]}


def test_crlf_comments_and_other_fields_are_fine():
    raw = b": hi\r\nevent: x\r\nid: 3\r\n" + sse(delta(content="a"), end="\r\n") + b"data:[DONE]\r\n\r\n"
    answer, stats, _ = assembled([raw])
    assert answer["choices"][0]["message"]["content"] == "a"
    assert stats["done"] is True


def test_an_error_event_is_the_error():
    assert assembled([sse({"error": {"message": "engine died"}})])[2] == "engine died"


def test_past_the_limit_a_stream_is_cut_and_says_so():
    _, stats, _ = assembled([sse(delta(content="x" * 100))] * 5, limit_bytes=300)
    assert stats["truncated"] is True


pieces = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([CALLS, sse(delta(content="あ")), b"data: {bad\n\n", b"\n", b"\r\n", b"data:", b": c\n"]),
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda i: st.dictionaries(
                st.sampled_from(
                    ["choices", "delta", "index", "text", "tool_calls", "function", "logprobs", "object", "error"]
                ),
                i | st.lists(i),
            ),
            max_leaves=8,
        ).map(lambda value: sse(value) if isinstance(value, dict) else sse(json.dumps(value))),
    ),
    max_size=6,
)


@steady
@given(pieces.map(b"".join), st.lists(st.integers(0, 2000), max_size=12))
def test_any_bytes_cut_anywhere_give_the_same_answer_and_never_raise(raw, cuts):
    edges = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    whole = assembled([raw], limit_bytes=500)
    assert assembled([raw[a:b] for a, b in pairwise(edges)], limit_bytes=500) == whole
    assert assembled([raw[i : i + 1] for i in range(len(raw))], limit_bytes=500) == whole
    json.dumps(whole)
