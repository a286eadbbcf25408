"""A corpus and a tokenizer of the Hub: pinned, streamed only as far as the run needs, errors of ours."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import (
    READ,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
    run_client,
)

pytestmark = pytest.mark.long

# `datasets` reads HF_ENDPOINT and the cache folders when it is imported: a process of its own.
_PREPARE = """
import json, sys
import numpy as np
from pathlib import Path
from huggingface_hub import HfApi
from flows.recipes import resolve_pretrain
from tasks.artifacts import ArtifactStore
from tasks.corpus.run import pin_inputs, prepare_corpus
from tasks.pretrain.run import pretrain_key

def show(values, token):
    small = {"shape": {"vocab_size": 300}, "row_tokens": 16, "rows_per_step": 5, "num_steps": 2, "corpus": "ada/books"}
    spec, hub = resolve_pretrain("compact_1b4", {**small, **values}), HfApi(token=token)
    try:
        corpus = prepare_corpus(spec, ArtifactStore(Path(sys.argv[1])), hub)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    assert spec.streaming or "torch" not in sys.modules  # the class of a stream in datasets is one of torch
    assert pretrain_key(spec, pin_inputs(spec, hub)) == pretrain_key(spec, corpus.pins)
    return {**corpus.model_dump(), "ends": np.fromfile(corpus.path / "document_ends.bin", "<i8").tolist()}
"""


def in_a_process(hub: HubServer, tmp_path: Path, code: str) -> dict[str, Any]:
    script = _PREPARE + textwrap.dedent(code) + "\nprint('SAID' + json.dumps(said))"
    done = run_client(hub, tmp_path / "hf-home", script, str(tmp_path / "store"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("SAID"))


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


def test_a_data_set_by_revision_and_split_at_its_commit(hub: HubServer, tmp_path: Path):
    texts = [f"the book number {number} of the library" for number in range(20)]
    held = {"train.jsonl": as_jsonl(texts), "test.jsonl": as_jsonl(texts[:7])}
    repo = hub.add_repo("dataset", "ada/books", held, private=True)
    first = repo.branches["main"]
    hub.add_repo("dataset", "ada/books", {"train.jsonl": as_jsonl(texts[:9])})
    hub.add_repo("dataset", "ada/card", {"README.md": b"no data yet"})
    said = in_a_process(hub, tmp_path, f"""
        said = {{
            "main": show({{}}, {READ!r}),
            "first": show({{"corpus_revision": {first!r}}}, {READ!r}),
            "test": show({{"corpus_split": "test"}}, {READ!r}),
            "split": show({{"corpus_split": "nope"}}, {READ!r}),
            "column": show({{"text_column": "body"}}, {READ!r}),
            "stream column": show({{"text_column": "body", "streaming": True}}, {READ!r}),
            "number": show({{"text_column": "n"}}, {READ!r}),
            "missing": show({{"corpus": "ada/none"}}, {READ!r}),
            "anonymous": show({{}}, False),
            "card": show({{"corpus": "ada/card"}}, {READ!r}),
        }}
    """)  # fmt: skip
    assert [said[name]["num_documents"] for name in ("main", "first", "test")] == [9, 20, 7]
    assert said["first"]["pins"] == {"corpus": first} and said["main"]["pins"] != said["first"]["pins"]
    assert len(said["first"]["ends"]) == 20 and said["first"]["ends"][-1] == said["first"]["num_tokens"]
    assert said["split"]["error"] == "DataError" and "test" in said["split"]["message"]  # what exists
    for name in ("column", "stream column"):
        assert said[name]["error"] == "DataError", said[name]
        assert "no column 'body' (it has: n, text): set PretrainSpec.text_column" in said[name]["message"]
    assert said["number"]["error"] == "DataError" and "'n' is int, expected text" in said["number"]["message"]
    assert said["missing"]["error"] == "MissingError" and "404" in said["missing"]["message"]
    assert said["anonymous"]["error"] == "TokenError" and "401" in said["anonymous"]["message"]
    assert said["card"]["error"] == "DataError", said["card"]
    assert "data set ada/card@" in said["card"]["message"] and "no data that can be" in said["card"]["message"]


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_a_stream_is_read_as_far_as_the_run_needs(hub: HubServer, tmp_path: Path, rows: str):
    """160 tokens: 2 steps of 5 rows of 16 tokens. A document longer than a row counts as one row, not as more."""
    texts = ["x" * 1000] + [f"the book number {number} of the library " * 3 for number in range(4000)]
    hub.add_repo("dataset", "ada/books", {f"{part}.jsonl": as_jsonl(texts) for part in "abc"}, private=True)
    said = in_a_process(hub, tmp_path, f"""
        values = {{"rows": {rows!r}, "tokenizer": "train"}}
        said = {{
            "some": show({{**values, "streaming": True}}, {READ!r}),
            "more": show({{**values, "streaming": True, "num_steps": 4}}, {READ!r}),
            "again": show({{**values, "streaming": True, "learning_rate": 0.5}}, {READ!r}),
        }}
    """)  # fmt: skip
    lengths = [
        end - start - 1 for start, end in zip([0, *said["some"]["ends"]], said["some"]["ends"], strict=False)
    ]  # without the end token
    usable = [min(length, 16) if rows == "documents" else length for length in lengths]
    assert sum(usable) >= 160 > sum(usable[:-1])
    assert said["more"]["num_documents"] > said["some"]["num_documents"]
    assert said["again"]["key"] == said["some"]["key"]
    assert not list((tmp_path / "hf-home" / "datasets").rglob("*.arrow"))
    assert not hub.count("GET", r"/resolve/.*/[bc]\.jsonl")


def test_a_tokenizer_of_the_hub_is_pinned(hub: HubServer, tmp_path: Path):
    from tasks.corpus.tokenizer import train_bpe

    text = "the book of the library " * 9
    hub.add_repo("dataset", "ada/books", {"train.jsonl": as_jsonl([text, text])})
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}).encode()
    held = {"tokenizer.json": train_bpe([text], 280).to_str().encode(), "tokenizer_config.json": config}
    commit = hub.add_repo("model", "ada/words", {**held, "model.safetensors": b"0" * 99}).branches["main"]
    hub.add_repo("model", "ada/none", {"config.json": b"{}"})
    said = in_a_process(hub, tmp_path, f"""
        names = ("words", "none", "nowhere")
        said = {{name: show({{"tokenizer": "ada/" + name}}, {READ!r}) for name in names}}
    """)  # fmt: skip
    assert said["words"]["pins"]["tokenizer"] == commit and said["words"]["num_documents"] == 2
    assert not hub.count("GET", "model.safetensors")
    assert said["none"]["error"] == "MissingError" and "has no tokenizer.json" in said["none"]["message"]
    assert said["nowhere"]["error"] == "MissingError" and "model ada/nowhere@main: 404" in said["nowhere"]["message"]


def test_a_hub_that_fails_is_worth_another_try(hub: HubServer, tmp_path: Path):
    hub.add_repo("dataset", "ada/books", {"train.jsonl": as_jsonl(["some text of a book"] * 9)})
    for method in ("GET", "HEAD", "POST"):
        hub.fail(method, "/(resolve|tree|paths-info)/", times=1000, status=503)
    said = in_a_process(hub, tmp_path, "said = show({'streaming': True}, False)")
    assert said["error"] in {"TransientError", "UnavailableError"}, said
