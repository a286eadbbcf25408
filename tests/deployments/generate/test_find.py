"""A name is a folder, an artifact, a recipe or a Hub id; what is none of them is answered with what exists."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from deployments.generate.find import find_model
from flows.recipes import resolve_pretrain
from tasks.artifacts import ArtifactStore, BaseCheckpoint, PretrainedModel
from tasks.errors import MissingError, SpecError
from tasks.fetch.run import fetch_base
from tasks.specs import BaseModelSpec
from tests.tasks.pretrain.test_found import commit
from tests.tiny import save_model


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def pretrain(store: ArtifactStore, name: str, pin: str) -> PretrainedModel:
    model = commit(store, resolve_pretrain(name), pin)
    (model.path / "model").mkdir()
    (model.path / "model" / "config.json").write_text("{}")
    return model


def test_each_kind_of_name(store: ArtifactStore, tmp_path: Path):
    base = fetch_base(BaseModelSpec(model=str(save_model(tmp_path / "m"))), store, HfApi(token=False))
    tiny, compact = pretrain(store, "tiny", "a"), pretrain(store, "compact_1b4", "b")
    assert find_model(str(tmp_path / "m"), store.root).place == str(tmp_path / "m")
    assert find_model(base.short, store.root).place == base.model_folder
    assert find_model("tiny", store.root).place == tiny.model_folder
    assert find_model("compact_1b4", store.root).place == find_model("latest", store.root).place == compact.model_folder
    assert find_model("openai/gpt-oss-20b", store.root).place == "openai/gpt-oss-20b"
    assert store.committed(BaseCheckpoint) == [base]


def test_what_is_none_of_them_is_answered_with_what_exists(store: ArtifactStore, tmp_path: Path):
    model = pretrain(store, "tiny", "a")
    with pytest.raises(
        MissingError, match=rf"no model 'tinny' .* pretrained/{model.short}; pretrain recipes: tiny, co"
    ):
        find_model("tinny", store.root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty has no config\.json"):
        find_model(str(tmp_path / "empty"), store.root)
    with pytest.raises(MissingError, match="no pretrained model of the recipe compact_1b4"):
        find_model("compact_1b4", store.root)
    with pytest.raises(MissingError, match=r"Artifacts below .*: none"):
        find_model("latest", tmp_path / "nothing")
    (model.path / "model" / "config.json").unlink()
    (model.path / "model").rmdir()
    with pytest.raises(MissingError):
        find_model(model.short, store.root)


def test_digits_that_fit_several_are_refused(store: ArtifactStore):
    models = [pretrain(store, "tiny", str(number)) for number in range(17)]
    digits = [model.key[0] for model in models]
    with pytest.raises(SpecError, match="give more digits of the key"):
        find_model(next(digit for digit in digits if digits.count(digit) > 1), store.root)
