"""What a notebook's session settles: whether a token is needed, and one dtype for all sessions of a project."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from flows.recipes import resolve, resolve_base
from tasks.check import session as subject
from tasks.check.run import keep_recipe
from tasks.errors import MissingError
from tasks.specs import FetchSpec, Recipe, change
from tests.hub_server import (
    READ,
    WRITE,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)

NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *compute_cap*) echo "{name}, {capability}" ;;
  *) echo "GPU-1, {name}, 15360, 15000" ;;
esac
"""


@pytest.fixture
def recipe(hub: HubServer) -> Recipe:
    """A public base and public data, both on the Hub."""
    hub.add_repo("model", "ada/base", {"config.json": b"{}"})
    hub.add_repo("dataset", "ada/rows", {"train.jsonl": b"{}\n"})
    return change(resolve("qwen_qlora_16gb"), {"base": {"model": "ada/base"}, "fetch": {"source": "ada/rows"}})


def client(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_nothing_is_asked_for_where_all_is_public_or_here(recipe: Recipe, hub: HubServer):
    assert subject.why_token(recipe, None, client(hub)) == ""
    tiny = resolve("tiny")
    hub.requests.clear()
    assert subject.why_token(tiny, resolve_base(tiny), client(hub)) == ""
    assert hub.requests == []


@pytest.mark.parametrize(("kind", "name"), [("model", "ada/base"), ("dataset", "ada/rows")])
def test_a_gated_repo_needs_one(recipe: Recipe, hub: HubServer, kind: str, name: str):
    hub.repos[kind, name].gated = True
    reason = subject.why_token(recipe, None, client(hub))
    assert name in reason
    assert subject.why_token(recipe, None, client(hub, READ)) == ""
    assert "wrong or expired" in subject.why_token(recipe, None, client(hub, "hf_mistyped"))  # else it stays


def test_publishing_needs_one(recipe: Recipe, hub: HubServer):
    published = change(recipe, {"publish": {"repo_id": "me/it"}})
    assert subject.why_token(published, None, client(hub)) == "publishing to me/it"
    mine = change(recipe, {"publish": {"repo_id": "ada/it"}})
    assert subject.why_token(mine, None, client(hub, WRITE)) == ""
    assert "is read-only; it needs write access" in subject.why_token(mine, None, client(hub, READ))  # not after hours


def test_a_data_file_that_is_not_there_is_no_matter_of_a_token(recipe: Recipe, hub: HubServer):
    with pytest.raises(MissingError, match=r"no\.jsonl is not there"):
        subject.why_token(recipe.model_copy(update={"fetch": FetchSpec(source="no.jsonl")}), None, client(hub))


def use_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, capability: str) -> None:
    """Let nvidia-smi, which is not ours, tell of another GPU."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(NVIDIA_SMI.format(name=name, capability=capability))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_an_old_gpu_trains_in_float32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    use_gpu(tmp_path / "bin", monkeypatch, "Tesla T4", "7.5")
    settled = subject.settle_dtype(resolve("qwen_qlora_16gb"), tmp_path / "out")
    assert settled.train.dtype == "float32"
    assert "Tesla T4 (compute capability 7.5) computes bfloat16 by imitation" in caplog.text
    use_gpu(tmp_path / "bin", monkeypatch, "NVIDIA L4", "8.9")
    assert subject.settle_dtype(resolve("qwen_qlora_16gb"), tmp_path / "new").train.dtype == "bfloat16"
    use_gpu(tmp_path / "bin", monkeypatch, "Old", "[N/A]")  # a driver that can't tell
    assert subject.settle_dtype(resolve("qwen_qlora_16gb"), tmp_path / "third").train.dtype == "bfloat16"


def begin(recipe: Recipe, folder: Path) -> Recipe:
    """A session that comes as far as its training."""
    settled = subject.settle_dtype(recipe, folder)
    keep_recipe("notebook", settled, folder)
    return settled


def test_the_next_session_goes_on_in_the_first_ones_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The dtype is in the adapter's key: another one would begin anew, and Colab gives what GPU it has."""
    recipe = resolve("qwen_qlora_16gb")
    for first, second, dtype in (("7.5", "8.9", "float32"), ("8.9", "7.5", "bfloat16")):
        folder = tmp_path / first
        use_gpu(tmp_path / "bin", monkeypatch, "first", first)
        begun = begin(recipe, folder)
        use_gpu(tmp_path / "bin", monkeypatch, "second", second)
        assert subject.settle_dtype(recipe, folder) == begun
        assert begun.train.dtype == dtype
    other = change(recipe, {"train": {"lora": {"rank": 2}}})  # other settings: nothing to go on with
    assert begin(other, tmp_path / "7.5").train.dtype == "float32"
    use_gpu(tmp_path / "bin", monkeypatch, "third", "8.0")
    assert subject.settle_dtype(recipe, tmp_path / "7.5").train.dtype == "bfloat16"


def test_a_setting_that_trains_nothing_changes_no_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """HUB_REPO_ID is set when the adapter is there: in float32, which a push from a newer GPU must find."""
    recipe = resolve("qwen_qlora_16gb")
    use_gpu(tmp_path / "bin", monkeypatch, "first", "7.5")
    begun = begin(recipe, tmp_path)
    use_gpu(tmp_path / "bin", monkeypatch, "second", "8.9")
    changes = {"publish": {"repo_id": "me/it"}, "train": {"report_to": "wandb"}, "serve": {"max_model_len": 9}}
    settled = subject.settle_dtype(change(recipe, changes), tmp_path)
    assert settled.train.key_values() == begun.train.key_values()
    assert settled.publish.repo_id == "me/it"


def test_a_dtype_that_was_asked_for_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the warning of a slow one advises, also where the project began in that one."""
    recipe = resolve("qwen_qlora_16gb")
    use_gpu(tmp_path / "bin", monkeypatch, "first", "8.9")
    assert begin(recipe, tmp_path).train.dtype == "bfloat16"
    asked = change(recipe, {"train": {"dtype": "float32"}})
    assert subject.settle_dtype(asked, tmp_path) == asked


def test_a_session_that_was_refused_settles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No GPU was chosen, or 14 B did not fit a T4: the next GPU has the dtype that is right there."""
    recipe = resolve("qwen_qlora_16gb")
    assert subject.settle_dtype(recipe, tmp_path).train.dtype == "bfloat16"
    use_gpu(tmp_path / "bin", monkeypatch, "Tesla T4", "7.5")
    assert subject.settle_dtype(recipe, tmp_path).train.dtype == "float32"
    use_gpu(tmp_path / "bin", monkeypatch, "NVIDIA L4", "8.9")
    assert subject.settle_dtype(recipe, tmp_path).train.dtype == "bfloat16"


def test_a_torn_recipe_is_no_matter(tmp_path: Path):
    (tmp_path / "recipe.json").write_text('{"resolved": {"train"')
    assert subject.settle_dtype(resolve("tiny"), tmp_path).train.dtype == "float32"
    assert subject.settle_dtype(resolve("qwen_qlora_16gb"), tmp_path).train.dtype == "bfloat16"
