"""Data sets pushed and pulled by the real clients over the loopback Hub: what it stands on is what the product uses.

Models are pushed in tests/tasks/publish and pulled in tests/tasks/fetch; here the other half of the protocol.
"""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub_server import (
    NOBODY,
    READ,
    WRITE,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
    run_client,
)

REPO = "ada/rows"


def client(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture(params=["xet", "lfs"])
def transfer(request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data set of two parquet files and a card."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "rows"
    folder.mkdir()
    for split, numbers in (("train", range(100)), ("test", range(100, 110))):
        pq.write_table(pa.table({"q": [f"q{n}" for n in numbers]}), folder / f"{split}.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- ja\n---\nrows\n")
    return folder


def push(hub: HubServer, rows: Path, *, private: bool = True) -> str:
    api = client(hub)
    api.create_repo(REPO, repo_type="dataset", private=private, exist_ok=True)
    return api.upload_folder(repo_id=REPO, folder_path=rows, repo_type="dataset").oid


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("private", [True, False])
def test_a_data_set_is_pushed_and_pulled(hub: HubServer, rows: Path, transfer: str, private: bool, tmp_path: Path):
    commit = push(hub, rows, private=private)
    assert hub.repos["dataset", REPO].private is private
    hub.learn_xet_hashes(rows)
    pulled = Path(client(hub, READ).snapshot_download(REPO, repo_type="dataset", cache_dir=tmp_path / "cache"))
    assert pulled.name == commit
    assert contents(pulled).items() >= contents(rows).items()
    assert (hub.count("GET", "/xet-read-token/") > 0) is (transfer == "xet")
    info = client(hub, READ).dataset_info(REPO)
    assert info.card_data and info.card_data.license == "mit"


def test_a_second_push_makes_no_commit(hub: HubServer, rows: Path, transfer: str):
    first = push(hub, rows)
    hub.requests.clear()
    assert push(hub, rows) == first
    assert hub.count("POST", "/commit/") == 0


def test_who_may_not_push_is_refused(hub: HubServer, rows: Path, transfer: str):
    push(hub, rows)
    with pytest.raises(HfHubHTTPError, match="403"):
        client(hub, READ).upload_folder(repo_id=REPO, folder_path=rows, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):  # private: to a stranger it is not there
        client(hub, NOBODY).upload_folder(repo_id=REPO, folder_path=rows, repo_type="dataset")


def test_a_gated_data_set_is_pulled_by_who_accepted_its_terms(hub: HubServer, rows: Path, tmp_path: Path):
    push(hub, rows, private=False)
    hub.repos["dataset", REPO].gated = True
    for token in (NOBODY, False):
        with pytest.raises(GatedRepoError):
            client(hub, token).hf_hub_download(REPO, "train.parquet", repo_type="dataset", cache_dir=tmp_path / "no")
    found = client(hub, READ).hf_hub_download(REPO, "train.parquet", repo_type="dataset", cache_dir=tmp_path / "yes")
    assert Path(found).read_bytes() == (rows / "train.parquet").read_bytes()


def test_an_interrupted_push_shows_nothing_and_sends_the_rest_later(hub: HubServer, rows: Path):
    rule = hub.fail("POST", "/commit/", times=1000, status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        push(hub, rows)
    assert set(hub.content("dataset", REPO)) == {".gitattributes"}
    rule.times = 0
    hub.requests.clear()
    push(hub, rows)
    assert hub.count("PUT", "/storage/") == 0 and "train.parquet" in hub.content("dataset", REPO)


def test_an_interrupted_pull_goes_on_inside_the_file(hub: HubServer, rows: Path, tmp_path: Path):
    (rows / "more.bin").write_bytes(os.urandom(200_000))
    push(hub, rows)
    rule = hub.fail("GET", "/resolve/.*/more.bin", status=0, keep_bytes=50_000)
    found = client(hub, READ).hf_hub_download(REPO, "more.bin", repo_type="dataset", cache_dir=tmp_path / "cache")
    assert rule.hits == 1 and Path(found).read_bytes() == (rows / "more.bin").read_bytes()


_PUSH = """
import json, sys
from datasets import Dataset, load_dataset
token = sys.stdin.readline().strip()
Dataset.from_dict({"q": ["a", "b"], "n": [1, 2]}).push_to_hub("ada/made", private=True, token=token)
print("ROWS" + json.dumps(load_dataset("ada/made", split="train", token=token).to_list()))
"""


def test_the_datasets_library_pushes_and_pulls(hub: HubServer, tmp_path: Path):
    """It reads HF_ENDPOINT at import: a process of its own."""
    done = run_client(hub, tmp_path / "hf-home", _PUSH, said=f"{WRITE}\n")
    assert "ROWS" in done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout.partition("ROWS")[2]) == [{"q": "a", "n": 1}, {"q": "b", "n": 2}]
    assert hub.repos["dataset", "ada/made"].private
