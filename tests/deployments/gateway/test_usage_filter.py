import json
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.gateway.usage_filter import UsageFilter

USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 8}}
events = st.lists(
    st.sampled_from(
        [
            b'data: {"choices":[{"index":0,"delta":{"content":"\\"usage\\" \\n"}}]}',
            b'data: {"choices":[{"index":0}],"usage":{"total_tokens":8}}',
            b'data: {"choices":[],"usage":null}',
            b'data: {"choices":[],"usage":',
            b': "usage" in a comment',
            b"event: x\ndata: [DONE]",
            b"",
        ]
    ),
    max_size=5,
)


def run(data, cuts=()):
    kept = UsageFilter()
    places = [0, *sorted(set(cuts)), len(data)]
    return b"".join([*(kept.feed(data[i:j]) for i, j in pairwise(places)), kept.flush()])


@example([b""], [], b"\n\n", [6])  # an empty event first, and a cut right after it
@settings(max_examples=1000)
@given(events, events, st.sampled_from([b"\n\n", b"\r\n\r\n"]), st.lists(st.integers(1, 400), max_size=8))
def test_only_the_usage_event_goes_missing_however_the_bytes_are_cut(before, after, end, cuts):
    usage = b"data: " + json.dumps(USAGE).encode()
    shown = b"".join(event + end for event in before + after)
    data = b"".join(event + end for event in [*before, usage, *after])
    assert run(data, [cut for cut in cuts if cut < len(data)]) == shown


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_any_bytes_without_usage_pass_as_they_are(pieces):
    kept = UsageFilter()
    assert b"".join([*map(kept.feed, pieces), kept.flush()]) == b"".join(pieces)


def test_whole_events_pass_at_once_and_parts_wait_for_their_end():
    kept = UsageFilter()
    assert kept.feed(b"data: 1\n\ndata: 2\n\n") == b"data: 1\n\ndata: 2\n\n"
    assert kept.feed(b"data: 3\n\ndata: 4") == b"data: 3\n\n"
    assert kept.feed(b"4\n\n") == b"data: 44\n\n"
    assert kept.feed(b"x" * 300_000) == b"x" * 300_000  # no token counts are so long
