"""What calls.py makes of text that Weave would refuse, follow or choke on; tests/weave asks the real server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.traces.calls import call
from tests.records import make_record

surrogates = st.characters(categories=["Cs"])
texts = st.text() | st.text(surrogates) | st.sampled_from(["weave:///a/b/op/c:d", "weave-trace-internal:///x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(values)
def test_any_json_value_becomes_strict_json_without_links(value):
    sent = call(make_record(1, request={"messages": value}, error=str(value)), "team/tatara", 3 << 20)
    text = json.dumps(sent, allow_nan=False, ensure_ascii=False)
    text.encode()  # no half of a pair is left
    assert "weave:///" not in text
    assert "weave-trace-internal:///" not in text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ordinary_text_is_kept_to_the_letter(text):
    messages = [{"role": "user", "content": text}]
    assert (
        call(make_record(1, request={"messages": messages}), "team/tatara", 3 << 20)["inputs"]["messages"] == messages
    )


@pytest.mark.parametrize("depth", [10, 50, 70, 500, 900])
def test_deep_nesting_ends_in_text_and_never_in_an_error(depth):
    sent = call(make_record(1, request={"x": json.loads("[" * depth + "]" * depth)}), "team/tatara", 3 << 20)
    value, levels = sent["inputs"]["x"], 0
    while isinstance(value, list) and value:
        value, levels = value[0], levels + 1
    assert levels < 60
    assert value == [] if depth < 60 else "[" in value


def test_a_failure_without_a_text_has_an_exception():
    assert call(make_record(1, status="cancelled"), "team/tatara", 3 << 20)["exception"] == "cancelled"
    assert call(make_record(1), "team/tatara", 3 << 20)["exception"] is None


def test_an_endless_error_text_is_cut_like_the_answer():
    sent = call(make_record(1, status="error", error="x" * 4_000_000), "team/tatara", 3 << 20)
    assert len(sent["exception"]) < 3000


@pytest.mark.parametrize("details", ["prompt_tokens_details", "input_tokens_details"])
def test_cached_tokens_have_the_names_by_which_weave_prices_them(details):
    usage = {"prompt_tokens": 9, details: {"cached_tokens": 8, "cache_write_tokens": 1, "audio_tokens": None}}
    summary = call(make_record(1, usage=usage), "team/tatara", 3 << 20)["summary"]
    cached = {"cache_read_input_tokens": 8, "cache_creation_input_tokens": 1}
    assert summary["usage"] == {"tiny": {"requests": 1, "prompt_tokens": 9, **cached}}


def test_usage_without_details_has_no_cached_tokens():
    for details in ({}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {"cached_tokens": None}}):
        usage = {"prompt_tokens": 9, "completion_tokens": 1} | details
        summary = call(make_record(1, usage=usage), "team/tatara", 3 << 20)["summary"]
        assert summary["usage"] == {"tiny": {"requests": 1, "prompt_tokens": 9, "completion_tokens": 1}}
