"""The rebuilt tokenizer is gpt-oss's: same ids as tiktoken and harmony, same chat as harmony."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import CorruptError, MissingError
from tasks.gptoss import tokenizer as subject

harmony = pytest.importorskip("openai_harmony", reason="comes with the package oss-harmony")

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\tx",
    "a\r\nb\r\n",
    "   leading",
    "trailing   ",
    "a  b   c    d",
    " \n \n x",
    "こんにちは、調子はどう？",
    "祇園祭は京都の八坂神社の祭礼です。",
    "東京都港区芝公園4丁目2-8",
    "ひらがな カタカナ 漢字 ｶﾀｶﾅ ＡＢＣ１２３",
    "「お盆」と（正月）は、いつですか？",
    "縁側で、風鈴が……鳴る——夏。",
    "令和六年一月一日　全角　空白",
    "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。",
    "々〆ヶゝゞ〜",
    "がぎぐ",  # combining voiced marks
    "𠮟る 𩸽",
    "Hello, world!",
    "HELLO wOrLd iPhone McDonald's",
    "I'm you're we'll they've he'd it's DON'T",
    "naïve café Straße İstanbul",
    "1 12 123 1234 12345 3.14159 1,000,000",
    "x = [i**2 for i in range(10)]  # squares",
    "def f(a: int) -> str:\n    return f'{a!r}'\n",
    "if (a != b) { return a === b ? /re+/g : `${x}`; }",
    "SELECT * FROM t WHERE a >= 1 AND b <> 'x';",
    "https://example.org/a/b?c=d&e=%20#frag",
    "path/to//file.txt\n/usr/bin/\n",
    "<html><body>&nbsp;</body></html>",
    '{"key": [1, 2.5, null, true], "キー": "値"}',
    "😀😃👨‍👩‍👧‍👦🏳️‍🌈🇯🇵",
    "🍣と🍵を、どうぞ👍🏽",
    "Ωμέγα Привет שלום مرحبا नमस्ते ไทย",
    "한국어 中文 粵語",
    "\u200b\u200dzero\u00a0width\ufeff",
    "∑∫√≠≤≥±×÷",
    "!!!???...---===***",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababababababababababab",
    "の" * 40,
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    subject.build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:  # Any: the class is chosen by transformers
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoding() -> Any:  # Any: untyped third-party class
    return harmony.load_harmony_encoding("HarmonyGptOss")


def test_ids_and_special_tokens_are_those_of_gpt_oss(tokenizer: Any, folder: Path):
    assert len(tokenizer) == 201_088
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|startoftext|>", 199_998)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|return|>", 200_002)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 199_999)
    marks = ["<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|constrain|>", "<|reserved_201087|>"]
    ids = [200_005, 200_006, 200_007, 200_008, 200_012, 200_003, 201_087]
    assert tokenizer.convert_tokens_to_ids(marks) == ids
    assert tokenizer("".join(marks)).input_ids == ids
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_encoded_and_decoded_as_harmony_does(text: str, tokenizer: Any, encoding: Any):
    ids = tokenizer(text).input_ids
    assert ids == encoding.encode(text)
    assert tokenizer.decode(ids) == text


def test_long_mixed_text_is_encoded_as_tiktoken_does(tokenizer: Any):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(subject.read_ranks())}
    specials = {text: i for i, text in subject.special_tokens().items()}
    pattern = subject.PATTERN
    reference = tiktoken.Encoding("o200k", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    for text in [*TEXTS, "\n".join(TEXTS), "".join(reversed(TEXTS))]:
        assert tokenizer(text).input_ids == reference.encode(text, allowed_special="all")


def test_pattern_is_the_one_tiktoken_ships():
    source = pytest.importorskip("tiktoken_ext.openai_public")
    pieces = [piece for piece in subject.PATTERN.split("|") if piece]
    text = Path(source.__file__).read_text()
    body = text[text.index("def o200k_base") : text.index("def o200k_harmony")]
    assert all(piece in body for piece in pieces)


def _pin_date(monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    from transformers.utils import chat_template_utils

    class PinnedDate(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(date)

    monkeypatch.setattr(chat_template_utils, "datetime", PinnedDate)


def test_chat_is_rendered_as_harmony_does(tokenizer: Any, encoding: Any, monkeypatch: pytest.MonkeyPatch):
    _pin_date(monkeypatch, "2026-11-21")
    question, answer = "七夕はいつですか？", "七月七日です。"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = harmony.SystemContent.new().with_conversation_start_date("2026-11-21")
    messages = [
        harmony.Message.from_role_and_content("system", system),
        harmony.Message.from_role_and_content("user", question),
        harmony.Message.from_role_and_content("assistant", answer).with_channel("final"),
    ]
    conversation = harmony.Conversation.from_messages(messages)
    ours = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer(ours).input_ids == encoding.render_conversation_for_training(conversation)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    asked = harmony.Conversation.from_messages(messages[:2])
    assert tokenizer(prompt).input_ids == encoding.render_conversation_for_completion(asked, harmony.Role.ASSISTANT)
    assert ours.startswith(prompt)


def test_template_is_trls_own_so_that_trl_can_swap_in_its_training_one(tokenizer: Any):
    assert tokenizer.chat_template.encode() == subject._read_chat_template()


def test_foreign_vocabulary_is_refused():
    with pytest.raises(CorruptError, match=r"the vocabulary of oss-harmony has sha256 .* but o200k_base has 446a9538"):
        subject.check_ranks([b"a", b"b"])


def test_missing_template_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="comes with TRL"):
        subject._read_chat_template()
