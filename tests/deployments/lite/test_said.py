"""From tokens to text: whole characters, the final channel alone, nothing after a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.lite.said import Said

SPECIALS = {256: "<|start|>", 257: "<|message|>", 258: "<|channel|>", 259: "<|end|>", 260: "<|return|>"}
NUMBERS = {name: token for token, name in SPECIALS.items()}


def decode(ids):
    return b"".join(bytes([token]) if token < 256 else SPECIALS[token].encode() for token in ids).decode(
        errors="replace"
    )


def encode(text):
    for name, token in NUMBERS.items():
        text = text.replace(name, chr(0xE000 + token))
    ids = []
    for letter in text:
        ids += [ord(letter) - 0xE000] if 0xE000 <= ord(letter) <= 0xE200 else letter.encode()
    return ids


def say(text, stop=(), harmony=True):
    said = Said(decode, SPECIALS, stop, harmony=harmony)
    pieces = [said.add(token) for token in encode(text)] + [said.end()]
    return said, [piece for some in pieces for piece in some]


def joined(pieces, part="content"):
    return "".join(text for kind, text in pieces if kind == part)


HARMONY = (
    "<|channel|>analysis<|message|>考え<|end|><|start|>assistant<|channel|>commentary<|message|>call<|end|>"
    "<|start|>assistant<|channel|>final <|message|>祭りは fun<|return|>"
)


def test_only_the_final_channel_is_content_and_headers_are_nothing():
    _, pieces = say(HARMONY)
    assert (joined(pieces), joined(pieces, "reasoning")) == ("祭りは fun", "考えcall")


def test_characters_come_whole_and_one_by_one():
    _, pieces = say("祭りだ", harmony=False)
    assert pieces == [("content", "祭"), ("content", "り"), ("content", "だ")]


@given(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=30))
def test_pieces_make_the_text(text):
    assert joined(say(text, harmony=False)[1]) == text
    assert joined(say(f"<|channel|>final<|message|>{text}<|return|>")[1]) == text


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_neither_stop_it_nor_get_lost(data):
    said = Said(decode, SPECIALS, (), harmony=False)
    pieces = [piece for token in data for piece in said.add(token)] + said.end()
    clean = "".join(letter for letter in data.decode(errors="ignore") if letter.isascii())
    got = joined(pieces)
    assert all(letter in got for letter in clean)
    assert not said.end()


@given(st.text("ab.", max_size=20), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_nothing_from_a_stop_text_on_is_shown_and_all_before_it_is(text, stop):
    said, pieces = say(text, stop, harmony=False)
    # each token is a letter, so the first stop text to be whole ends it
    ends = [(end, text[:end]) for end in range(1, len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    assert said.stopped is bool(ends)
    if ends:
        _, before = ends[0]
        longest = max((each for each in stop if before.endswith(each)), key=len)
        assert joined(pieces) == before.removesuffix(longest)
    else:
        assert joined(pieces) == text


def test_a_stop_text_in_the_reasoning_does_not_end_the_answer():
    said, pieces = say(HARMONY, stop=("考",))
    assert (said.stopped, joined(pieces)) == (False, "祭りは fun")


@pytest.mark.parametrize("text", ["<|channel|>analysis<|message|>so lange", "nothing said in harmony"])
def test_an_answer_without_a_final_channel_has_no_content(text):
    assert joined(say(text)[1]) == ""
