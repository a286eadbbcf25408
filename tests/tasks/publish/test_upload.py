"""What a person can ask of an upload: tags, pull requests, patterns, patience; each with xet off and on."""

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, snapshot_download

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel
from tasks.errors import (
    AccessError,
    GatedError,
    MissingError,
    RateLimitError,
    RightsError,
    SpecError,
    StorageFullError,
    TataraError,
    TokenError,
    UnavailableError,
    is_transient,
)
from tasks.publish import upload
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
from tests.hub_server import NOBODY, READ, WRITE, HubServer
from tests.tasks.publish.conftest import MADE, make_merged, write_model

pytestmark = pytest.mark.long

REPO = "ada/tuned"
SPEC = PublishSpec(repo_id=REPO)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def client(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture(params=["xet", "lfs"], autouse=True)
def transfer(request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs over both ways of sending weights."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


def digests(merged: MergedModel) -> dict[str, str]:
    folder = Path(merged.model_folder)
    return {name: files.digest(folder / name) for name in files.list_files(folder)}


def tree(hub: HubServer, revision: str) -> dict[str, str]:
    """What a repo holds: path -> sha256; of files that xet sent the Hub has no more than that."""
    repo = hub.repos["model", REPO]
    commit = repo.resolve(revision)
    assert commit is not None
    return repo.commits[commit]


def test_305_files_are_one_commit(store: ArtifactStore, hub: HubServer):
    def many(folder: Path) -> None:
        write_model(folder)
        for number in range(300):
            (folder / f"part-{number:03}.bin").write_bytes(os.urandom(64))

    merged = make_merged(store, many)
    published = publish_model(merged, SPEC, store, client(hub))
    assert hub.count("POST", "/commit/") == 1
    assert tree(hub, published.commit).items() >= digests(merged).items()


def test_nothing_is_sent_when_the_branch_holds_it_although_the_manifest_is_lost(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, tmp_path: Path
):
    first = publish_model(merged, SPEC, store, client(hub))
    (first.path / "manifest.json").unlink()
    hub.requests.clear()
    again = publish_model(merged, SPEC, store, client(hub))
    assert again.commit == first.commit and hub.writes() == ["POST /api/repos/create"]
    assert hub.count("POST", "/preupload/") == hub.count("GET", "/xet-write-token/") == 0
    hub.requests.clear()
    elsewhere = ArtifactStore(tmp_path / "elsewhere")
    assert publish_model(make_merged(elsewhere), SPEC, elsewhere, client(hub)).commit == first.commit
    assert hub.count("POST", "/commit/") == 0


def test_a_persons_words_in_the_card_are_kept(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    first = publish_model(merged, SPEC, store, client(hub))
    hub.add_repo("model", REPO, {"README.md": b"---\nlicense: mit\n---\nmine"})
    head = hub.repos["model", REPO].branches["main"]
    again = publish_model(merged, SPEC, store, client(hub))
    assert again.commit == head != first.commit and hub.count("POST", "/commit/") == 1
    hub.repos["model", REPO].add("main", {SHARDS[0]: None})  # now something has to be sent: it goes beside their card
    published = publish_model(merged, SPEC, store, client(hub))
    assert hub.blobs[tree(hub, published.commit)["README.md"]].endswith(b"mine")
    assert tree(hub, published.commit).items() >= digests(merged).items()


def test_only_what_changed_is_sent(store: ArtifactStore, merged: MergedModel, hub: HubServer, tmp_path: Path):
    publish_model(merged, SPEC, store, client(hub))
    other_store = ArtifactStore(tmp_path / "other")

    def second_shard_differs(folder: Path) -> None:
        write_model(folder)
        (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1] + b"\xff")

    hub.asked_paths.clear()
    other = make_merged(other_store, second_shard_differs)
    published = publish_model(other, SPEC, other_store, client(hub))
    assert tree(hub, published.commit).items() >= digests(other).items()
    assert hub.asked_paths == [["README.md", SHARDS[1]]]  # the card names the digest


def test_a_tag_names_the_commit(store: ArtifactStore, merged: MergedModel, hub: HubServer, tmp_path: Path):
    spec = PublishSpec(repo_id=REPO, tag="v1.0")
    published = publish_model(merged, spec, store, client(hub))
    repo = hub.repos["model", REPO]
    assert repo.tags == {"v1.0": published.commit} and repo.branches["main"] == published.commit
    hub.requests.clear()
    assert publish_model(merged, spec, store, client(hub)) == published
    assert hub.writes() == []
    del repo.tags["v1.0"]
    assert publish_model(merged, spec, store, client(hub)).commit == published.commit
    assert repo.tags == {"v1.0": published.commit}
    other_store = ArtifactStore(tmp_path / "other")
    other = make_merged(other_store, lambda folder: write_model(folder, 9))
    before = dict(repo.commits)
    with pytest.raises(SpecError, match=rf"tag = 'v1.0' is at commit {published.commit[:8]} there, which holds some"):
        publish_model(other, spec, other_store, client(hub))
    assert repo.commits == before  # said before anything was sent
    with pytest.raises(SpecError, match=r"revision = 'v1.0' is a tag there, and tags can't be written to"):
        publish_model(other, PublishSpec(repo_id=REPO, revision="v1.0"), other_store, client(hub))


def test_a_tag_whose_answer_is_lost_is_not_in_the_way(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    spec = PublishSpec(repo_id=REPO, tag="v1.0")
    hub.fail("POST", "/tag/", status=503, after=True)
    with pytest.raises(UnavailableError):
        publish_model(merged, spec, store, client(hub))
    published = publish_model(merged, spec, store, client(hub))
    assert hub.repos["model", REPO].tags == {"v1.0": published.commit} and hub.count("POST", "/commit/") == 1


def test_a_pull_request_is_opened_once(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    spec = PublishSpec(repo_id=REPO, create_pr=True)
    repo = hub.add_repo("model", REPO, {"notes.md": b"mine"}, private=True)
    main = repo.branches["main"]
    published = publish_model(merged, spec, store, client(hub))
    assert repo.branches == {"main": main, "refs/pr/1": published.commit}
    assert published.pull_request == f"{hub.url}/{REPO}/discussions/1" and published.revision == "refs/pr/1"
    assert merged.model_digest[:12] in repo.pulls[1]
    assert tree(hub, "refs/pr/1").items() >= digests(merged).items()
    (published.path / "manifest.json").unlink()
    again = publish_model(merged, spec, store, client(hub))
    assert again == published and len(repo.pulls) == 1 and hub.count("POST", "/commit/") == 1
    hub.requests.clear()
    assert publish_model(merged, spec, store, client(hub)) == published
    assert hub.requests == [("GET", f"/api/models/{REPO}/revision/refs/pr/1")]


@pytest.mark.parametrize("status", [503, 0])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, status: int
):
    hub.add_repo("model", REPO, {}, private=True)
    hub.fail("POST", "/commit/", status=status, after=True)
    published = publish_model(merged, PublishSpec(repo_id=REPO, create_pr=True), store, client(hub))
    assert published.revision == "refs/pr/1" and list(hub.repos["model", REPO].pulls) == [1]


def test_who_may_not_write_may_still_open_a_pull_request(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    hub.tokens["hf_evesOwnTokenOfTheTests"] = ("eve", "write")
    repo = hub.add_repo("model", REPO, {})
    spec = PublishSpec(repo_id=REPO, create_pr=True, private=False)
    published = publish_model(merged, spec, store, client(hub, "hf_evesOwnTokenOfTheTests"))
    assert repo.branches["refs/pr/1"] == published.commit


def test_an_open_pull_request_can_be_written_to(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    repo = hub.add_repo("model", REPO, {}, private=True)
    repo.branches["refs/pr/3"] = repo.branches["main"]
    published = publish_model(merged, PublishSpec(repo_id=REPO, revision="refs/pr/3"), store, client(hub))
    assert repo.branches["refs/pr/3"] == published.commit and published.pull_request.endswith("/discussions/3")


@pytest.mark.parametrize("where", ["folder", "repo"])
def test_a_gitignore_drops_no_weights(store: ArtifactStore, hub: HubServer, where: str):
    def with_rules(folder: Path) -> None:
        write_model(folder)
        if where == "folder":
            (folder / ".gitignore").write_text("*.safetensors\n*.json\n")
            (folder / ".gitattributes").write_text("")

    if where == "repo":
        hub.add_repo("model", REPO, {".gitignore": b"*.safetensors\n*.json\n"}, private=True)
    merged = make_merged(store, with_rules)
    published = publish_model(merged, SPEC, store, client(hub))
    held = tree(hub, published.commit)
    assert {*SHARDS, "config.json"} <= held.keys()
    assert (".gitignore" in held) is (where == "repo")
    assert held[".gitattributes"] == tree(hub, next(iter(hub.repos["model", REPO].commits)))[".gitattributes"]


def test_patterns_leave_files_out_but_never_the_weights(store: ArtifactStore, hub: HubServer):
    def with_rubbish(folder: Path) -> None:
        write_model(folder)
        (folder / "half.tmp").write_bytes(b"rubbish")
        (folder / "notes.txt").write_bytes(b"mine")

    merged = make_merged(store, with_rubbish)
    publish_model(merged, PublishSpec(repo_id=REPO, ignore_patterns=("*.tmp", "notes.*")), store, client(hub))
    assert tree(hub, "main").keys() == {*digests(merged), *MADE, ".gitattributes"} - {"half.tmp", "notes.txt"}
    with pytest.raises(SpecError, match=r"leaves out the weights model-00001-of-00002.safetensors"):
        publish_model(merged, PublishSpec(repo_id=REPO, ignore_patterns=("*.safetensors",)), store, client(hub))


FULL = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
TRIPPED = "Your storage patterns tripped our internal systems! Please contact us."
OTHER = "You don't have the rights to create a commit"


@pytest.mark.parametrize(
    ("status", "headers", "kind", "message"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, TokenError, "401, the token is wr"),
        (403, {"X-Error-Message": OTHER}, RightsError, "403, the token is valid but lacks this right"),
        (403, {"X-Error-Message": FULL}, StorageFullError, "403, the account's storage on the Hub is full"),
        (403, {"X-Error-Message": TRIPPED}, StorageFullError, "storage on the Hub is full .*contact us"),
        (413, {"X-Error-Message": "Storage quota exceeded"}, StorageFullError, "413, the account's storage"),
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, GatedError, "gated; accept its terms"),
        (404, {"X-Error-Code": "RevisionNotFound"}, MissingError, "no such revision"),
        (404, {"X-Error-Code": "RepoNotFound"}, MissingError, "404, it does not exist"),
        (429, {"Retry-After": "40"}, RateLimitError, "429, too many requests; it is retried in 40 s"),
        (429, {"ratelimit": '"api";r=0;t=55'}, RateLimitError, "429, too many requests; it is retried in 55 s"),
        (429, {}, RateLimitError, "429, too many requests; it is retried later"),
        (500, {}, UnavailableError, "the Hub answered 500"),
        (504, {}, UnavailableError, "the Hub answered 504"),
        (422, {"X-Error-Message": "no"}, AccessError, r"the Hub refused with 422 \(no"),
    ],
)
@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)  # a commit is the same request either way
def test_each_refusal_of_a_commit_has_its_own_error(
    store: ArtifactStore,
    merged: MergedModel,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    kind: type[TataraError],
    message: str,
):
    monkeypatch.setattr(upload, "_MAX_WAIT_S", 0)
    hub.fail("POST", "/commit/", times=1000, status=status, headers=headers)
    with pytest.raises(kind, match=f"publishing to ada/tuned: .*{message}") as caught:
        publish_model(merged, SPEC, store, client(hub))
    assert type(caught.value) is kind
    assert is_transient(caught.value) is (status == 429 or status >= 500)
    assert hub.count("POST", "/commit/") == 1 and store.committed(PublishedModel) == []


@pytest.mark.parametrize(("status", "kind"), [(401, TokenError), (403, RightsError)])
def test_a_refusal_of_the_storage_is_final(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, status: int, kind: type[TataraError]
):
    """hf_xet calls it a ConnectionError: taken at its word, it would be tried again for a quarter of an hour."""
    path = "/xet-write-token/|/objects/batch$"
    rules = [hub.fail(method, path, times=1000, status=status) for method in ("GET", "POST")]
    with pytest.raises(kind, match=f"publishing to ada/tuned: {status}") as caught:
        publish_model(merged, SPEC, store, client(hub))
    assert not is_transient(caught.value) and sum(rule.hits for rule in rules) == 1
    assert set(tree(hub, "main")) == {".gitattributes"}


def test_retry_after_is_waited_for(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    waited: list[float] = []
    monkeypatch.setattr(upload.time, "sleep", waited.append)
    hub.fail("POST", "/commit/", times=2, status=429, headers={"Retry-After": "40"})
    published = publish_model(merged, SPEC, store, client(hub))
    assert waited == [40, 40] and tree(hub, published.commit).items() >= digests(merged).items()
    hub.fail("GET", "/api/whoami-v2", times=1000, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(RateLimitError) as caught:  # longer than a worker should sit there: Prefect's retry
        publish_model(merged, PublishSpec(repo_id="ada/more"), store, client(hub))
    assert caught.value.retry_after_s == 3600 and waited == [40, 40]


@pytest.mark.parametrize(
    ("name", "permissions", "may"),
    [(REPO, ["repo.write"], True), ("ada", ["repo.write"], True), (REPO, ["repo.content.read"], False)],
)
@pytest.mark.parametrize("hub_knows", [True, False])
@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)
def test_a_fine_grained_token_is_told_before_the_upload(
    store: ArtifactStore,
    merged: MergedModel,
    hub: HubServer,
    name: str,
    permissions: list[str],
    may: bool,
    hub_knows: bool,
):
    hub.tokens["hf_fineGrainedOfTheTests"] = ("ada", "none")
    hub.scopes["hf_fineGrainedOfTheTests"] = [
        {"entity": {"type": "model" if "/" in name else "user", "name": name}, "permissions": permissions}
    ]
    hub.add_repo("model", REPO, {})
    if not hub_knows:
        hub.fail("GET", "/auth-check/write$", times=1000, status=404)
    spec = PublishSpec(repo_id=REPO, private=False)
    if may:
        assert publish_model(merged, spec, store, client(hub, "hf_fineGrainedOfTheTests")).place == "hub"
        return
    with pytest.raises(RightsError, match="403"):
        publish_model(merged, spec, store, client(hub, "hf_fineGrainedOfTheTests"))
    assert hub.writes() == []


def test_a_card_that_the_hub_refuses_stops_the_upload_before_it_begins(
    store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    spec = PublishSpec(repo_id=REPO, license="my own")
    with pytest.raises(SpecError, match=r'the Hub refuses the model card.*"license" must be one of'):
        publish_model(merged, spec, store, client(hub))
    assert set(tree(hub, "main")) == {".gitattributes"} and hub.count("POST", "/preupload/") == 0


def test_what_was_published_can_be_pulled(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, transfer: str, tmp_path: Path
):
    published = publish_model(merged, SPEC, store, client(hub))
    hub.learn_xet_hashes(Path(published.path / "model"))
    pulled = client(hub, READ).snapshot_download(REPO, revision=published.commit, cache_dir=tmp_path / "cache")
    folder = Path(pulled)
    assert {name: files.digest(folder / name) for name in files.list_files(folder)}.items() >= digests(merged).items()
    assert (hub.count("GET", "/xet-read-token/") > 0) is (transfer == "xet")
    for token, error in ((False, "401"), (NOBODY, "404")):
        with pytest.raises(Exception, match=error):
            snapshot_download(
                REPO, revision=published.commit, endpoint=hub.url, token=token, cache_dir=tmp_path / "other"
            )
