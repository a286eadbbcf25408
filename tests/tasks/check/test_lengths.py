"""A row that is too long is found before its base is made, and no tokenizer is loaded for rows that must fit."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.recipes import pretrain_compact_1b4, pretrain_tiny, tiny
from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks.check import lengths as subject
from tasks.check.base import find_origin, find_tokenizer
from tasks.corpus.run import prepare_corpus
from tasks.errors import DataError
from tasks.fetch.run import fetch_base, fetch_dataset
from tasks.pack.render import render_chats
from tasks.pack.run import pack_dataset
from tasks.pretrain.run import pretrain_key, pretrained_origin
from tasks.specs import BaseModelSpec, FetchSpec, PackSpec, Recipe, change
from tests.tiny import byte_tokenizer, save_model, write_chats

HUB = HfApi(token=False)


def fetch(tmp_path: Path, store: ArtifactStore, longest: str = "") -> FetchedDataset:
    path = write_chats(tmp_path / "chats.jsonl", 40)
    if longest:
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": longest}]
        with path.open("a") as handle:
            handle.write(json.dumps({"messages": chat}) + "\n")
    return fetch_dataset(FetchSpec(source=str(path), validation_pct=20), store, HUB)


def on_base(folder: Path, row_tokens: int) -> Recipe:
    return change(tiny(), {"base": {"model": str(folder)}, "pack": {"row_tokens": row_tokens}})


def test_rows_that_must_fit_need_no_tokenizer(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    recipe = on_base(tmp_path / "no-base-at-all", 2048)
    said = subject.check_lengths(fetch(tmp_path, store), recipe, None, store, HUB)
    assert said == "lengths: none of 40 rows can exceed 2048 tokens"


def test_the_worst_row_is_named_and_a_packed_data_set_is_not_looked_at_again(tmp_path: Path):
    store, folder = ArtifactStore(tmp_path / "home"), save_model(tmp_path / "base")
    dataset = fetch(tmp_path, store, longest="あ" * 80)
    recipe = on_base(folder, 250)
    with pytest.raises(DataError, match=r"1 of 41 documents .* chats\.jsonl:41 has 2\d\d tokens but a row holds 250"):
        subject.check_lengths(dataset, recipe, None, store, HUB)
    recipe = on_base(folder, 300)
    assert "the longest of 41 rows has 2" in subject.check_lengths(dataset, recipe, None, store, HUB)
    base = fetch_base(BaseModelSpec(model=str(folder)), store, HUB)
    pack_dataset(dataset, base, recipe.pack, store)
    assert subject.check_lengths(dataset, recipe, None, store, HUB) == "lengths: packed before"


def test_too_long_rows_that_are_dropped_are_no_fault(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    recipe = change(on_base(tmp_path / "none", 64), {"pack": {"too_long": "drop"}})
    assert "no row is too long" in subject.check_lengths(fetch(tmp_path, store), recipe, None, store, HUB)


def test_a_base_that_is_made_here_is_asked_by_the_tokenizer_that_it_will_have(tmp_path: Path, harmony_tokenizer: Path):
    store = ArtifactStore(tmp_path / "home")
    store.root.mkdir()
    (store.root / "tokenizers").symlink_to(harmony_tokenizer.parent)
    dataset = fetch(tmp_path, store, longest="祭" * 600)
    recipe = change(tiny(), {"pack": {"row_tokens": 512}})
    with pytest.raises(DataError, match=r"chats\.jsonl:41 has \d+ tokens but a row holds 512"):
        subject.check_lengths(dataset, recipe, pretrain_tiny(), store, HUB)
    assert not list((store.root / "pretrained").glob("*"))


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.text(max_size=20))
def test_no_rendered_row_has_more_tokens_than_the_bound(texts: list[str], system: str):
    messages = [
        message
        for text in texts
        for message in ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    ]
    row = {"row_id": "r", "messages": messages}
    spec = PackSpec(row_tokens=4096, system_prompt=system)
    bound = subject.most_tokens(row, system)
    assert all(document.num_tokens <= bound for document in render_chats([row], byte_tokenizer(), spec))


def test_a_base_with_a_tokenizer_of_its_own_has_its_corpus_prepared(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    spec = BaseModelSpec(model="pretrain:compact_1b4")
    pretraining = pretrain_compact_1b4()
    folder = find_tokenizer(spec, pretraining, store, HUB)
    corpus = prepare_corpus(pretraining, store, HUB)
    assert folder == corpus.path / "tokenizer"
    assert find_origin(spec, pretraining, HUB) == pretrained_origin(pretrain_key(pretraining, corpus.pins))
