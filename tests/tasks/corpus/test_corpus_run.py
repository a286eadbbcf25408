"""A corpus from each local source: its documents, its tokenizer, its key, and what is wrong said by name."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from transformers import AutoTokenizer

from flows.recipes import resolve_pretrain
from tasks.artifacts import ArtifactStore, TokenizedCorpus, digest_files
from tasks.corpus import run as subject
from tasks.corpus import sources
from tasks.corpus.report import corpus_markdown
from tasks.corpus.tokenizer import train_bpe
from tasks.errors import CorruptError, DataError, MissingError, SpecError, TransientError
from tasks.pretrain.run import pretrain_key
from tasks.specs import PretrainSpec, change

pytestmark = pytest.mark.long

HUB = HfApi(token=False)
ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["one two three", "two three four", "three four five\nsix"]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def make_spec(corpus: object, **changes: Any) -> PretrainSpec:
    small = {"tokenizer": "train", "shape": {"vocab_size": 300}, "row_tokens": 8}
    return change(resolve_pretrain("compact_1b4"), {**small, "corpus": str(corpus), **changes})


def prepare(store: ArtifactStore, corpus: object, **changes: Any) -> TokenizedCorpus:
    return subject.prepare_corpus(make_spec(corpus, **changes), store, HUB)


def ids_of(corpus: TokenizedCorpus) -> np.ndarray:
    return np.fromfile(corpus.path / "tokens.bin", corpus.dtype)


def documents_of(corpus: TokenizedCorpus) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(corpus.path / "tokenizer")
    ends = np.fromfile(corpus.path / "document_ends.bin", "<i8")
    assert ends[-1] == corpus.num_tokens == len(ids_of(corpus))
    return [tokenizer.decode(part) for part in np.split(ids_of(corpus), ends[:-1])]


def test_tiny_has_the_tokens_and_the_key_that_it_always_had(store: ArtifactStore, harmony_tokenizer: Path):
    store.root.mkdir()
    (store.root / "tokenizers").symlink_to(harmony_tokenizer.parent)
    spec = resolve_pretrain("tiny")
    corpus = subject.prepare_corpus(spec, store, HUB)
    text = (ROOT / "data" / "ja_culture" / "corpus.txt").read_text(encoding="utf-8")
    for folder in (harmony_tokenizer, corpus.path / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert ids_of(corpus).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (corpus.num_documents, corpus.num_tokens, corpus.dtype) == (1, 81366, "uint32")
    assert pretrain_key(spec, corpus.pins).startswith("2123086b6557cabb")
    assert subject.prepare_corpus(spec, store, HUB) == corpus


def test_the_sentences_are_500_documents_with_a_tokenizer_of_their_own(store: ArtifactStore):
    spec = resolve_pretrain("compact_1b4")
    corpus = subject.prepare_corpus(spec, store, HUB)
    sentences = (ROOT / "data" / "short_english" / "sentences.txt").read_text().splitlines()
    assert documents_of(corpus) == [f"{sentence}<|eos|>" for sentence in sentences]
    assert (corpus.num_documents, corpus.dtype) == (500, "uint16") and corpus.vocab_size <= spec.shape.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(corpus.path / "tokenizer")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False)
    assert shown == "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Yes.<|eos|>"
    assert shown.startswith(tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))


def write_text(folder: Path) -> Path:
    (folder / "a.txt").write_text("\n\n".join(text.replace("\n", " ") for text in TEXTS) + "\n")
    return folder / "a.txt"


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in [*TEXTS, None, " "]))
    return folder / "a.jsonl"


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), folder / "a.parquet")
    return folder / "a.parquet"


def write_folder(folder: Path) -> Path:
    """Sorted by path: a/z.txt, b.jsonl, c.parquet; what is hidden or of another kind is not read."""
    root = folder / "texts"
    for part in ("a", ".cache"):
        (root / part).mkdir(parents=True)
        (root / part / "z.txt").write_text(TEXTS[0])
    (root / "b.jsonl").write_text(json.dumps({"text": TEXTS[1]}))
    pq.write_table(pa.table({"text": [TEXTS[2]]}), root / "c.parquet")
    (root / "README.md").write_text("not read")
    return root


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet, write_folder])
def test_each_source_gives_the_same_documents(tmp_path: Path, store: ArtifactStore, write: Callable[[Path], Path]):
    corpus = prepare(store, write(tmp_path))
    texts = [text.replace("\n", " ") for text in TEXTS] if write is write_text else TEXTS
    assert documents_of(corpus) == [f"{text}<|eos|>" for text in texts]


def test_a_text_file_is_one_document_or_its_lines(tmp_path: Path, store: ArtifactStore):
    path = write_text(tmp_path)
    whole = prepare(store, path, documents="files")
    assert documents_of(whole) == [path.read_text()]  # a single one has no end token
    assert prepare(store, path, documents="lines").num_documents == 3


def test_the_same_corpus_has_the_same_bytes_in_any_process(tmp_path: Path):
    """Another hash seed, another number of threads."""
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import HfApi; from tasks.artifacts import *\n"
        "from flows.recipes import resolve_pretrain; from tasks.corpus.run import prepare_corpus\n"
        "prepare_corpus(resolve_pretrain('compact_1b4', {'corpus': sys.argv[2]}), ArtifactStore(Path(sys.argv[1])),"
        " HfApi(token=False))\n"
        "assert 'torch' not in sys.modules"
    )
    corpus = ROOT / "data" / "ja_culture" / "corpus.txt"
    found: list[dict[str, str]] = []
    for number, threads in enumerate((1, 4)):
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        env |= {"PYTHONHASHSEED": str(number), "PYTHONPATH": str(ROOT)}
        home = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, home, corpus], env=env, check=True)
        found.append({name: d for name, d in digest_files(home / "corpus").items() if not name.endswith(".json")})
        found[-1] |= {name: d for name, d in digest_files(home / "corpus").items() if "tokenizer/" in name}
    assert found[0] == found[1]
    assert any(name.endswith("tokens.bin") for name in found[0])


def test_what_decides_nothing_tokenises_nothing_again(tmp_path: Path, store: ArtifactStore):
    path = write_jsonl(tmp_path)
    corpus = prepare(store, path)
    assert prepare(store, path, learning_rate=1e-5, num_steps=7, row_tokens=4) == corpus
    others = [{"documents": "files"}, {"shape": {"vocab_size": 280}}, {"text_column": "n2"}]
    path.write_text(path.read_text().replace('"n"', '"n2"').replace("1", '"text of another column"'))
    keys = {prepare(store, path, **changes).key for changes in others}
    assert len(keys | {corpus.key}) == 4


def test_a_named_tokenizer_is_used_and_pinned(tmp_path: Path, store: ArtifactStore):
    path = write_jsonl(tmp_path)
    trained = prepare(store, path)
    named = prepare(store, path, tokenizer=str(trained.path / "tokenizer"))
    assert ids_of(named).tolist() == ids_of(trained).tolist()
    assert set(named.pins) == {"corpus", "tokenizer"} and set(trained.pins) == {"corpus"}
    spec = make_spec(path, tokenizer=str(trained.path / "tokenizer"))
    key = pretrain_key(spec, subject.pin_inputs(spec, HUB))
    assert key == pretrain_key(spec, named.pins)
    (trained.path / "tokenizer" / "chat_template.jinja").write_text("other")
    assert pretrain_key(spec, subject.pin_inputs(spec, HUB)) != key


def test_the_report_shows_documents_where_their_tokens_end(tmp_path: Path, store: ArtifactStore):
    corpus = prepare(store, write_jsonl(tmp_path))
    manifest = store.manifest(TokenizedCorpus, corpus.key)
    assert manifest is not None
    shown = corpus_markdown(corpus, manifest["about"])
    assert "| documents | 3 |" in shown and f"| {corpus.num_tokens:,} |" in shown
    blocks = [block.strip() for block in shown.split("````text")[1:]]
    assert [block.split("````")[0].strip().replace("|", "") for block in blocks] == TEXTS
    assert manifest["about"]["statistics"]["num_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["about"]["statistics"]["num_text_tokens"] == corpus.num_tokens - 3


def _latin1(folder: Path) -> Path:
    (folder / "a.txt").write_bytes("caf\xe9 and more text\n".encode("latin-1") * 9)
    return folder / "a.txt"


def _surrogate(folder: Path) -> Path:
    (folder / "a.jsonl").write_text('{"text": "a \\ud800 lone surrogate"}\n')
    return folder / "a.jsonl"


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder / name

    return write


WRONG: list[tuple[Callable[[Path], Path], dict[str, Any], type[Exception], str]] = [
    (lambda folder: folder / "no.txt", {}, MissingError, r"corpus .*no\.txt is not there .*check PretrainSpec\.corpus"),
    (
        lambda folder: folder,
        {},
        MissingError,
        r"has no file that ends in \.txt, \.jsonl, \.parquet \(it holds: nothing",
    ),
    (_text("a.csv", "text\nabcdefghij\n"), {}, SpecError, r"a\.csv: \.csv files are not read, expected one of \.txt"),
    (_text("a.txt", "abc"), {}, DataError, r"has 3 bytes, less than a row of 8 tokens: add text, or lower"),
    (_text("a.txt", " \n" * 20), {}, DataError, r"a\.txt is empty: expected at least one document"),
    (
        _text("a.jsonl", '{"text": "ab", "other": "and"}'),
        {},
        DataError,
        r"has \d tokens, less than a row of 8: add text",
    ),
    (_latin1, {}, CorruptError, r"a\.txt is not UTF-8 .*convert it"),
    (_surrogate, {}, DataError, r"a\.jsonl \(a\.jsonl:1\): 'text' is no Unicode text \(surrogates not allowed\)"),
    (
        _text("a.jsonl", '{"body": "x", "n": 1}\n'),
        {},
        DataError,
        r"a\.jsonl:1\): there is no column 'text' \(it has: body, n\): set PretrainSpec\.text_column",
    ),
    (_text("a.jsonl", '{"text": 12, "n": 1}\n'), {}, DataError, r"'text' is int, expected text: set PretrainSpec"),
    (_text("a.jsonl", '{"text": "torn }\n'), {}, CorruptError, r"a\.jsonl:1 is not JSON"),
    (write_jsonl, {"tokenizer": "gpt-oss"}, SpecError, r"vocab_size = 300 but the gpt-oss tokenizer has 201088 ids"),
    (write_jsonl, {"shape": {"vocab_size": 261}}, SpecError, r"vocab_size = 261 but .* trained has at least 262 ids"),
    (write_jsonl, {"tokenizer": "./no"}, MissingError, r"no has no tokenizer\.json: check PretrainSpec\.tokenizer"),
    (write_jsonl, {"streaming": True}, SpecError, r"streaming is for Hub data sets, but corpus = .*: set it to false"),
    (lambda _: Path("ada/books"), {}, MissingError, r"dataset ada/books@main: HF_HUB_OFFLINE is set"),
]


@pytest.mark.parametrize(("write", "changes", "error", "message"), WRONG)
def test_what_is_wrong_is_said_and_leaves_nothing(
    tmp_path: Path,
    store: ArtifactStore,
    write: Callable[[Path], Path],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
):
    (tmp_path / "data").mkdir()
    with pytest.raises(error, match=message):
        prepare(store, write(tmp_path / "data"), **changes)
    if "tokens, less than" not in message:  # that one is a whole corpus for a smaller row
        assert not store.committed(TokenizedCorpus) and not list(store.root.rglob("*.bin"))


def test_a_tokenizer_that_is_too_large_is_named_with_both_numbers(tmp_path: Path, store: ArtifactStore):
    path = write_jsonl(tmp_path)
    folder = prepare(store, path).path / "tokenizer"
    with pytest.raises(SpecError, match=r"tokenizer .* has \d+ ids but GptOssShape\.vocab_size = 200: raise"):
        prepare(store, path, tokenizer=str(folder), shape={"vocab_size": 200})


def test_a_torn_tokenizer_is_named(tmp_path: Path, store: ArtifactStore):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptError, match=r"tokenizer .*/tokenizer \(.*\) can't be read: .*; download or make it"):
        prepare(store, write_jsonl(tmp_path), tokenizer=str(tmp_path / "tokenizer"))


def test_a_file_that_is_edited_while_it_is_read_is_read_again(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
):
    path, train = write_jsonl(tmp_path), train_bpe

    def edited(*args: Any) -> Any:
        path.write_text(path.read_text() + json.dumps({"text": "one more"}))
        return train(*args)

    monkeypatch.setattr("tasks.corpus.tokenizer.train_bpe", edited)
    with pytest.raises(TransientError, match="changed while it was read"):
        prepare(store, path)
    assert not store.committed(TokenizedCorpus)


def test_surveying_reads_the_first_document_only(tmp_path: Path):
    path = write_text(tmp_path)
    assert subject.survey_corpus(make_spec(path), HUB) == f"corpus {path}, 0.0 MB"
    path.write_bytes(path.read_bytes() * 2000 + b"\xff")
    assert sources.text_bytes(make_spec(path)) > 80_000
    subject.survey_corpus(make_spec(path), HUB)
    with pytest.raises(CorruptError):
        subject.survey_corpus(make_spec(_latin1(tmp_path)), HUB)


_KILLED = """
import sys; from pathlib import Path; from huggingface_hub import HfApi; from tasks.artifacts import *
from flows.recipes import resolve_pretrain; from tasks.corpus import run, tokens
tokens._FLUSH_TOKENS = 1000
changes = {"corpus": sys.argv[2], "tokenizer": sys.argv[3], "documents": "lines"}
run.prepare_corpus(resolve_pretrain("compact_1b4", changes), ArtifactStore(Path(sys.argv[1])), HfApi(token=False))
"""


def test_a_corpus_that_was_killed_half_way_is_made_whole_by_the_next_run(tmp_path: Path, store: ArtifactStore):
    tokenizer = prepare(store, write_jsonl(tmp_path)).path / "tokenizer"
    path = tmp_path / "many.txt"
    lines = [f"document {number} of a long corpus with words enough" for number in range(60_000)]
    path.write_text("\n".join(lines))
    argv = [sys.executable, "-c", _KILLED, str(store.root), str(path), str(tokenizer)]
    child = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not _partial_bytes(store) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert _partial_bytes(store)
    assert len(store.committed(TokenizedCorpus)) == 1 == len(list(store.root.glob("corpus/*/tokens.bin")))
    corpus = prepare(store, path, tokenizer=str(tokenizer), shape={"vocab_size": 32000})
    assert documents_of(corpus) == [f"{line}<|eos|>" for line in lines]
    assert not _partial_bytes(store)


def _partial_bytes(store: ArtifactStore) -> int:
    return sum(path.stat().st_size for path in store.root.glob("corpus/*/.tokens.bin.*.tmp"))
