import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tasks.traces.responses_stream import ResponsesAssembler

WHOLE = {"id": "resp_1", "object": "response", "model": "m", "status": "completed", "usage": {"total_tokens": 8}}


def event(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


def delta(text, kind="response.output_text.delta", index=0):
    return event(kind, delta=text, output_index=index)


CREATED = event("response.created", response={"id": "resp_1", "object": "response", "status": "in_progress"})
DONE = event("response.completed", response=WHOLE)


def assemble(data, cuts=()):
    assembler = ResponsesAssembler()
    places = [0, *sorted(set(cuts)), len(data)]
    for i, j in pairwise(places):
        assembler.feed(data[i:j])
    assembler.finish()
    return assembler


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.integers(1, 600), max_size=8))
def test_the_last_event_holds_the_answer_however_the_bytes_are_cut(texts, cuts):
    data = CREATED + b"".join(map(delta, texts)) + DONE
    found = assemble(data, [cut for cut in cuts if cut < len(data)])
    assert (found.answer(), found.done, found.error) == (WHOLE, True, None)
    assert found.stats() == {"chunks": len(texts) + 2, "malformed": 0, "done": True, "truncated": False}


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_a_cut_stream_keeps_what_came(texts):
    data = CREATED + delta("思う", "response.reasoning_text.delta") + b"".join(delta(text, index=1) for text in texts)
    found = assemble(data)
    reasoning, message = found.answer()["output"]
    assert reasoning == {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "思う"}]}
    assert message["content"] == [{"type": "output_text", "text": "".join(texts)}]
    assert (found.answer()["status"], found.done) == ("in_progress", False)


@given(st.binary(max_size=300))
def test_nothing_that_a_server_sends_raises(data):
    assemble(data).answer()
    assemble(b"data: " + data + b"\n\n").answer()


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["type", "response", "error", "delta", "output_index"]), x)))  # fmt: skip  # noqa: E501
def test_no_json_raises_either(value):
    assemble(f"data: {json.dumps(value)}\n\n".encode()).answer()


def test_errors_are_found():
    assert assemble(event("error", message="overloaded")).error == "overloaded"
    failed = event("response.failed", response=WHOLE | {"status": "failed", "error": {"message": "out of memory"}})
    assert (assemble(failed).error, assemble(failed).done) == ("out of memory", True)
    assert assemble(b"").answer() is None


def test_memory_is_bounded():
    assembler = ResponsesAssembler(limit_bytes=100)
    assembler.feed(CREATED + delta("x" * 1000) + DONE)
    assembler.finish()
    assert assembler.stats()["truncated"] is True
