"""`python -m tasks.publish`: the parameters of the seed's upload script mean what they meant."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from tasks.publish.__main__ import main
from tests.hub_server import READ, WRITE, HubServer
from tests.tasks.publish.conftest import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "fine_tuned_llama"
    made.mkdir()
    write_model(made)
    (made / "half.tmp").write_bytes(b"rubbish")
    return made


@pytest.fixture(autouse=True)
def endpoint(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)


def words(folder: Path, token: str = WRITE, repo_id: str = "ada/competition_model") -> list[str]:
    return ["--input_tokenizer_and_model_dir", str(folder), "--hf_token", token, "--repo_id", repo_id]


def test_the_folder_goes_to_the_root_of_the_repo_without_temporary_files(hub: HubServer, folder: Path):
    assert main(words(folder)) == 0
    held = hub.content("model", "ada/competition_model")
    del held[".gitattributes"]
    assert held == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}
    assert hub.repos["model", "ada/competition_model"].private
    hub.requests.clear()
    assert main(words(folder)) == 0 and hub.count("POST", "/commit/") == 0


def test_a_public_repo_is_taken_when_that_is_said(hub: HubServer, folder: Path):
    hub.add_repo("model", "ada/competition_model", {})
    assert main(words(folder)) == 1 and hub.writes() == []
    assert main([*words(folder), "--public"]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token": READ}, "403, the token of ada is read-only"),
        ({"token": ""}, "no token: set HF_TOKEN"),
        ({"repo_id": ""}, "no repository is named: give --repo_id"),
        ({"repo_id": "alone"}, "PublishSpec.repo_id = 'alone'"),
        ({"folder": Path("/nowhere")}, "/nowhere is no folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture, change: dict, said: str
):
    assert main(words(**{"folder": folder, **change})) == 1
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("error: ") and said in line and WRITE not in line and hub.writes() == []
