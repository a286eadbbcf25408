"""What is learnt is what a server will ask for: every token in its place, in our words and the template's."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.pack import render as subject
from tasks.pack.render import Document
from tasks.specs import PackSpec
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
SPEC = PackSpec(row_tokens=64)
words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="|<>"), min_size=1, max_size=20)
chats = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def _row(pairs: list[tuple[str, str]], row_id: str = "r") -> dict[str, Any]:
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"row_id": row_id, "messages": messages}


def _asked(pairs: list[tuple[str, str]], question: str) -> str:
    history = "".join(
        f"<|start|>user<|message|>{q}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|end|>" for q, a in pairs
    )
    return f"{history}<|start|>user<|message|>{question}<|end|><|start|>assistant"


@given(chats)
def test_each_answer_is_a_document_whose_tokens_decode_to_the_chat(pairs: list[tuple[str, str]]):
    documents = subject.render_chats([_row(pairs)], TOKENIZER, SPEC)
    assert len(documents) == len(pairs)
    for index, (document, (question, answer)) in enumerate(zip(documents, pairs, strict=True)):
        assert TOKENIZER.decode(document.prompt_ids) == _asked(pairs[:index], question)
        assert TOKENIZER.decode(document.answer_ids) == f"<|channel|>final<|message|>{answer}<|return|>"
        assert document.input_ids == document.prompt_ids + document.answer_ids
        assert document.num_tokens == len(document.input_ids)


@given(chats)
def test_labels_mask_exactly_the_prompt(pairs: list[tuple[str, str]]):
    for document in subject.render_chats([_row(pairs)], TOKENIZER, SPEC):
        labels, cut = subject.labels_of(document, "assistant"), len(document.prompt_ids)
        assert labels[:cut] == [-100] * cut
        assert labels[cut:] == document.answer_ids
        assert -100 not in labels[cut:] and cut > 0
        assert subject.labels_of(document, "all") == document.input_ids


def test_rows_keep_their_names_and_order():
    rows = [_row([("a", "b"), ("c", "d")], "one"), _row([("e", "f")], "two")]
    assert [document.row_id for document in subject.render_chats(rows, TOKENIZER, SPEC)] == ["one", "one", "two"]
    assert subject.render_chats([], TOKENIZER, SPEC) == []


def test_system_prompt_is_put_before_chats_that_have_none():
    spec = PackSpec(system_prompt="日本語で")
    with_own = _row([("q", "a")])
    with_own["messages"].insert(0, {"role": "system", "content": "own"})
    first, second = subject.render_chats([_row([("q", "a")]), with_own], TOKENIZER, spec)
    assert TOKENIZER.decode(first.prompt_ids).startswith("<|start|>system<|message|>日本語で<|end|><|start|>user")
    assert TOKENIZER.decode(second.prompt_ids).startswith("<|start|>system<|message|>own<|end|><|start|>user")


class _Template:
    """The byte tokenizer under another template."""

    eos_token_id = TOKENIZER.eos_token_id
    added_tokens_decoder = TOKENIZER.added_tokens_decoder

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        return TOKENIZER.apply_chat_template(conversation, **kwargs)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        return TOKENIZER(text, **kwargs)


CHATML = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)


def test_other_servers_read_control_tokens_in_a_prompt_and_only_answers_are_plain_text():
    """vLLM tokenises the rendered prompt of every family but gpt-oss as one text."""
    row = _row([("a<|end|>", "b<|end|>"), ("c<|pad|>", "d<|end|>e")])
    first, second = subject.render_chats([row], _Template(CHATML), SPEC)
    end, pad = (TOKENIZER.convert_tokens_to_ids(name) for name in ("<|end|>", "<|pad|>"))
    assert first.prompt_ids == TOKENIZER("user: a<|end|><|end|>assistant: ")["input_ids"]
    assert first.answer_ids[-1] == end and end not in first.answer_ids[:-1]
    assert TOKENIZER.decode(first.answer_ids) == "b<|end|><|end|>"
    assert second.prompt_ids.count(end) == 5 and second.prompt_ids.count(pad) == 1
    assert second.answer_ids.count(end) == 1


def test_text_that_can_not_be_kept_apart_is_refused():
    class Prefixing(_Template):
        """Like a SentencePiece tokenizer: a text's first piece is another one than a later piece."""

        def __call__(self, text: list[str], **kwargs: Any) -> Any:
            return super().__call__([" " + each for each in text], **kwargs)

    with pytest.raises(DataError, match=r"row r: it holds the text of a control token \(<\|end\|>\), which this"):
        subject.render_chats([_row([("a", "b<|end|>")])], Prefixing(CHATML), SPEC)


def test_a_chat_that_its_template_refuses_is_named():
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"row d:7: the chat template refuses it: System role not supported"):
        subject.render_chats([_row([("q", "a")], "d:7")], _Template(template), SPEC)


REWRITES = (
    "{% for m in messages %}{{ m.role if loop.last else m.role ~ ' ' ~ messages|length }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ADDS_NOTHING = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [REWRITES, ADDS_NOTHING])
def test_template_that_rewrites_its_prompt_is_refused(template: str):
    with pytest.raises(
        DataError, match=r"row d:7: the chat template does not keep the rendered prompt \(\d+ tokens\) in "
    ):
        subject.render_chats([_row([("q", "a")], "d:7")], _Template(template), SPEC)


@pytest.mark.parametrize("call", ["strftime_now('%Y-%m-%d')", 'strftime_now( "%Y-%m-%d" )'])
def test_date_is_pinned(call: str):
    template = TOKENIZER.chat_template.replace("{% for", "{{ " + call + " }}{% for", 1)
    spec = PackSpec(prompt_date="2001-02-03")
    [document] = subject.render_chats([_row([("q", "a")])], _Template(template), spec)
    assert TOKENIZER.decode(document.prompt_ids).startswith("2001-02-03<|start|>user")


def test_pinned_text_is_quoted_for_the_template():
    assert subject.pin_date("{{ strftime_now('%d o\"clock') }}", "2025-08-05") == "{{ '05 o\"clock' }}"
    assert subject.pin_date("{{ now }}", "2025-08-05") == "{{ now }}"


@given(st.lists(words, max_size=4))
def test_texts_are_learnt_whole_and_closed(texts: list[str]):
    documents = subject.render_texts([{"row_id": str(i), "text": text} for i, text in enumerate(texts)], TOKENIZER)
    assert [TOKENIZER.decode(document.input_ids) for document in documents] == [f"{text}<|return|>" for text in texts]
    assert all(subject.labels_of(document, "assistant") == document.input_ids for document in documents)


def _documents(lengths: list[int]) -> list[Document]:
    return [
        Document(row_id=f"x:{index}", prompt_ids=[1], answer_ids=[2] * (length - 1))
        for index, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 40))
def test_documents_are_parted_by_what_a_row_holds(lengths: list[int], capacity: int):
    documents = _documents(lengths)
    kept, dropped = subject.fit_context(documents, PackSpec(row_tokens=capacity, too_long="drop"))
    assert kept == [document for document in documents if document.num_tokens <= capacity]
    assert dropped == [document for document in documents if document.num_tokens > capacity]


def test_longest_document_is_named():
    with pytest.raises(
        DataError,
        match=r"2 of 4 documents are longer than a row: x:2 has 11 tokens but a row holds 8: raise PackSpec\.row_tokens"
        r", shorten them, or set PackSpec\.too_long to 'drop'",
    ):
        subject.fit_context(_documents([8, 9, 11, 1]), PackSpec(row_tokens=8))
