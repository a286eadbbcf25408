"""A base on the Hub is looked at through its headers: no weight is downloaded to say what is wrong."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore
from tasks.check import run as subject
from tasks.check.base import find_tokenizer, look_at_base
from tasks.errors import MissingError, SpecError
from tasks.models import base_shapes
from tasks.specs import BaseModelSpec, FetchSpec, LoraSpec, Recipe, ServeSpec, TrainSpec, change
from tests.hub_server import (
    READ,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)
from tests.tiny import save_model, write_chats

SPEC = BaseModelSpec(model="ada/base")


@pytest.fixture
def recipe(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_ports: list[int]) -> Recipe:
    """A recipe without a fault, on a base that only the Hub has, in two shards."""
    monkeypatch.setenv("TATARA_VLLM_PYTHON", sys.executable)
    folder = save_model(tmp_path / "upstream", shard_size="60KB")
    hub.add_repo("model", SPEC.model, {path.name: path.read_bytes() for path in folder.iterdir()})
    return Recipe(
        base=SPEC,
        fetch=FetchSpec(source=str(write_chats(tmp_path / "chats.jsonl", 40)), validation_pct=20),
        pack={"row_tokens": 256},  # pyright: ignore[reportArgumentType]
        train=TrainSpec(lora=LoraSpec(target_parameters=("1.mlp.experts.down_proj",))),
        serve=ServeSpec(vllm_port=free_ports[0], gateway_port=free_ports[1], max_model_len=512),
    )


def whole_weights(hub: HubServer) -> list[str]:
    """Shards that were asked for as files: a download begins with HEAD, a header is a GET of a range."""
    return [path for method, path in hub.requests if method == "HEAD" and "-of-" in path]


def test_the_facts_are_those_of_the_files(recipe: Recipe, hub: HubServer, tmp_path: Path):
    facts = look_at_base(SPEC, None, HfApi(endpoint=hub.url, token=READ))
    assert facts.shapes == base_shapes(tmp_path / "upstream")
    assert facts.context_tokens == 512
    weights = sum(path.stat().st_size for path in (tmp_path / "upstream").glob("*.safetensors"))
    assert weights < facts.download_bytes < weights + 100_000
    assert len(list((tmp_path / "upstream").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("changes", "cls", "message"),
    [
        ({"train": {"lora": {"target_parameters": ("9.mlp.experts.down_proj",)}}}, SpecError, "hits nothing.*2 layers"),
        ({"pack": {"row_tokens": 1024}}, SpecError, "row_tokens = 1024 but the base's context is 512 tokens"),
    ],
)
def test_what_does_not_fit_is_said_before_the_download(
    recipe: Recipe, hub: HubServer, tmp_path: Path, changes: dict, cls: type[Exception], message: str
):
    client = HfApi(endpoint=hub.url, token=READ)
    store = ArtifactStore(tmp_path / "home")
    said = subject.check_recipe(recipe, None, store, client)
    assert [line.partition(":")[0] for line in said[:5]] == ["data", "base", "adapter", "room", "memory"]
    with pytest.raises(cls, match=message):
        subject.check_recipe(change(recipe, changes), None, store, client)
    assert whole_weights(hub) == []


def test_too_little_disk_names_download_and_merged_model(
    recipe: Recipe, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subject.files, "free_bytes", lambda path: 50_000)
    with pytest.raises(SpecError, match=r"the run \(0\.1 GB \(checkpoints 0\.1, .*only 0\.0 GB are free") as caught:
        subject.check_recipe(recipe, None, ArtifactStore(tmp_path / "home"), HfApi(endpoint=hub.url, token=READ))
    assert "merged model 0.0" in str(caught.value) and "download 0.0" in str(caught.value)


def test_a_repo_without_safetensors_is_named(hub: HubServer):
    hub.add_repo("model", "ada/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(MissingError, match=r"ada/pickled@[0-9a-f]{8} has no \.safetensors weights: name a model"):
        look_at_base(BaseModelSpec(model="ada/pickled"), None, HfApi(endpoint=hub.url, token=READ))


def test_the_tokenizer_comes_without_the_weights(recipe: Recipe, hub: HubServer, tmp_path: Path):
    folder = find_tokenizer(SPEC, None, ArtifactStore(tmp_path), HfApi(endpoint=hub.url, token=READ))
    assert (folder / "tokenizer.json").exists() and not list(folder.glob("*.safetensors"))
    assert whole_weights(hub) == []
