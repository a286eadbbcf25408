"""publish_model against a loopback Hub, through the real huggingface_hub client."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel
from tasks.errors import AccessError, CorruptError, SpecError, TransientError, UnavailableError, is_transient
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
from tests.hub_server import READ, WRITE, HubServer
from tests.tasks.publish.conftest import MADE, make_merged, write_model

pytestmark = pytest.mark.long

REPO = "ada/tuned"
SPEC = PublishSpec(repo_id=REPO)


def client(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def sent_files(merged: MergedModel) -> dict[str, bytes]:
    folder = Path(merged.model_folder)
    return {name: (folder / name).read_bytes() for name in files.list_files(folder)}


def test_a_model_arrives_whole_in_a_new_private_repo(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    published = publish_model(merged, SPEC, store, client(hub))
    held = hub.content("model", REPO)
    card = held.pop("README.md").decode()
    assert held.pop("loss_curve.png").startswith(b"\x89PNG") and json.loads(held.pop("recipe.json"))
    assert held.pop(".gitattributes")
    assert held == sent_files(merged)
    assert merged.model_digest in card and "base_model: ada/base" in card and "rank 4" in card
    assert hub.repos["model", REPO].private
    assert published.place == "hub" and published.commit == hub.repos["model", REPO].branches["main"]
    assert published.url == f"{hub.url}/{REPO}/tree/{published.commit}"
    assert published.model_digest == merged.model_digest
    assert hub.count("POST", "/verify$") == 2  # each shard


def test_the_default_xet_path_publishes_the_same(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    published = publish_model(merged, SPEC, store, client(hub))
    tree = hub.repos["model", REPO].commits[published.commit]
    shards = {name: sha for name, sha in tree.items() if name.endswith(".safetensors")}
    assert shards == {name: files.digest(Path(merged.model_folder) / name) for name in shards} and len(shards) == 2
    assert hub.count("GET", "/xet-write-token/") >= 1 and hub.count("PUT", "") == 0


def test_a_second_call_asks_only_where_the_branch_is(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    first = publish_model(merged, SPEC, store, client(hub))
    hub.requests.clear()
    assert publish_model(merged, SPEC, store, client(hub)) == first
    assert hub.requests == [("GET", f"/api/models/{REPO}/revision/main")]


def test_what_another_model_replaced_is_published_again(
    tmp_path: Path, store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    other_store = ArtifactStore(tmp_path / "other")
    other = make_merged(other_store, lambda folder: write_model(folder, 9))
    first = publish_model(merged, SPEC, store, client(hub))
    second = publish_model(other, SPEC, other_store, client(hub))
    hub.requests.clear()
    again = publish_model(merged, SPEC, store, client(hub))
    assert hub.repos["model", REPO].branches["main"] == again.commit not in {first.commit, second.commit}
    assert hub.content("model", REPO).items() >= sent_files(merged).items()
    assert hub.count("PUT", "") == 0  # the Hub keeps the weights of its older commits
    assert store.committed(PublishedModel) == [again]
    assert publish_model(merged, SPEC, store, client(hub)) == again


def test_a_repo_or_branch_that_was_deleted_is_made_again(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    spec = PublishSpec(repo_id=REPO, revision="candidate")
    publish_model(merged, spec, store, client(hub))
    del hub.repos["model", REPO].branches["candidate"]
    published = publish_model(merged, spec, store, client(hub))
    assert hub.repos["model", REPO].branches["candidate"] == published.commit
    del hub.repos["model", REPO]
    published = publish_model(merged, spec, store, client(hub))
    assert hub.repos["model", REPO].private
    assert hub.content("model", REPO, published.commit).items() >= sent_files(merged).items()


def test_a_repo_that_became_public_is_refused(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    publish_model(merged, SPEC, store, client(hub))
    hub.repos["model", REPO].private = False
    with pytest.raises(AccessError, match=r"is public, but PublishSpec\.private is true"):
        publish_model(merged, SPEC, store, client(hub))


def test_a_persons_commit_on_top_is_kept(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    publish_model(merged, SPEC, store, client(hub))
    hub.add_repo("model", REPO, {"notes.md": b"mine"})
    num_commits = len(hub.repos["model", REPO].commits)
    published = publish_model(merged, SPEC, store, client(hub))
    assert published.commit == hub.repos["model", REPO].branches["main"]
    assert len(hub.repos["model", REPO].commits) == num_commits and "notes.md" in hub.content("model", REPO)


def test_a_hub_that_is_away_at_the_second_call_is_transient(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    published = publish_model(merged, SPEC, store, client(hub))
    rule = hub.fail("GET", "/revision/", times=1000, status=503)
    with pytest.raises(TransientError, match="looking for ada/tuned@main: the Hub answered 503"):
        publish_model(merged, SPEC, store, client(hub))
    rule.times = 0
    assert publish_model(merged, SPEC, store, client(hub)) == published


def test_a_lost_artifact_is_made_again_without_uploading(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    first = publish_model(merged, SPEC, store, client(hub))
    (first.path / "manifest.json").unlink()
    hub.requests.clear()
    assert publish_model(merged, SPEC, store, client(hub)).commit == first.commit
    assert hub.count("PUT", "") == 0 and hub.count("POST", "/commit/") == 0


def test_another_branch_is_made_and_main_stays_empty(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    spec = PublishSpec(repo_id=REPO, revision="candidate")
    published = publish_model(merged, spec, store, client(hub))
    repo = hub.repos["model", REPO]
    assert repo.branches["candidate"] == published.commit
    assert set(hub.content("model", REPO, "main")) == {".gitattributes"}


def test_the_repo_may_come_from_the_environment(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_REPO_NAME", "ada/from-env")
    assert publish_model(merged, PublishSpec(), store, client(hub)).repo_id == "ada/from-env"
    monkeypatch.setenv("HF_REPO_NAME", "no owner")
    with pytest.raises(SpecError, match="'no owner' is not owner/name"):
        publish_model(merged, PublishSpec(), store, client(hub))


def test_an_older_models_weights_go_and_a_persons_files_stay(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    old = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old", "notes.md": b"mine"}
    hub.add_repo("model", REPO, old, private=True)
    publish_model(merged, SPEC, store, client(hub))
    held = set(hub.content("model", REPO))
    assert held == {*sent_files(merged), *MADE, ".gitattributes", "notes.md"}


def test_a_wrong_token_is_401(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    with pytest.raises(AccessError, match="publishing to ada/tuned: 401, the token is wrong or expired"):
        publish_model(merged, SPEC, store, client(hub, "hf_wrongTokenOfTheTests"))
    assert hub.writes() == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_read_only_token_is_403_before_anything_is_sent(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, is_there: bool
):
    if is_there:  # create_repo(exist_ok=True) would succeed
        hub.add_repo("model", REPO, {}, private=True)
    with pytest.raises(AccessError, match=r"publishing to ada/tuned: 403, .*needs write access"):
        publish_model(merged, SPEC, store, client(hub, READ))
    assert hub.writes() == []


@pytest.mark.parametrize("path", ["/commit/", "/preupload/", "repos/create$", "/objects/batch$"])
def test_a_right_that_lacks_later_is_403_too(store: ArtifactStore, merged: MergedModel, hub: HubServer, path: str):
    hub.fail("POST", path, status=403)  # a fine-grained token shows its rights only when it writes
    with pytest.raises(AccessError, match="403, the token is valid but lacks this right"):
        publish_model(merged, SPEC, store, client(hub))
    assert store.committed(PublishedModel) == []


def test_a_public_repo_is_refused_when_a_private_one_was_asked_for(
    store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    repo = hub.add_repo("model", REPO, {})
    before = dict(repo.commits)
    with pytest.raises(AccessError, match=r"is public, but PublishSpec\.private is true"):
        publish_model(merged, SPEC, store, client(hub))
    assert repo.commits == before and hub.count("PUT", "") == 0
    assert publish_model(merged, PublishSpec(repo_id=REPO, private=False), store, client(hub)).place == "hub"


@pytest.mark.parametrize(
    ("method", "path", "times"),
    [("PUT", "/storage/", 3), ("POST", "/preupload/", 3), ("POST", "/objects/batch$", 3), ("POST", "/verify$", 3)],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_short_storm_is_weathered(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, method: str, path: str, times: int, after: bool
):
    rule = hub.fail(method, path, times=times, status=503, after=after)
    published = publish_model(merged, SPEC, store, client(hub))
    assert rule.hits == times
    assert hub.content("model", REPO, published.commit).items() >= sent_files(merged).items()


@pytest.mark.parametrize("status", [503, 429, 0])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/storage/"),
        ("POST", "/preupload/"),
        ("POST", "/commit/"),
        ("GET", "/tree/"),
        ("GET", "/api/whoami-v2$"),
        ("POST", "/api/repos/create$"),
        ("GET", "/api/models/ada/tuned$"),
    ],
)
def test_a_long_storm_is_transient_and_commits_no_artifact(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, method: str, path: str, status: int
):
    rule = hub.fail(method, path, times=1000, status=status)
    with pytest.raises(TransientError, match="publishing to ada/tuned: the Hub") as caught:
        publish_model(merged, SPEC, store, client(hub))
    assert is_transient(caught.value) and rule.hits
    assert store.committed(PublishedModel) == []
    rule.times = 0
    published = publish_model(merged, SPEC, store, client(hub))
    assert store.committed(PublishedModel) == [published]
    assert hub.content("model", REPO, published.commit).items() >= sent_files(merged).items()


def test_a_hub_that_is_not_there_is_transient(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    with pytest.raises(TransientError, match=r"can't be reached \(ConnectError\)"):
        publish_model(merged, SPEC, store, HfApi(endpoint="http://127.0.0.1:9", token=WRITE))


@pytest.mark.parametrize("status", [503, 0])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, status: int
):
    hub.fail("POST", "/commit/", status=status, after=True)
    published = publish_model(merged, SPEC, store, client(hub))
    assert hub.count("POST", "/commit/") == 1
    assert published.commit == hub.repos["model", REPO].branches["main"]
    assert len(hub.repos["model", REPO].commits) == 2  # the initial one and ours


def test_a_commit_whose_answer_and_head_are_lost_is_found_by_the_next_run(
    store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    hub.fail("POST", "/commit/", status=503, after=True)
    rule = hub.fail("GET", "/revision/main$", times=1000, skip=1)
    with pytest.raises(TransientError):
        publish_model(merged, SPEC, store, client(hub))
    stored = hub.repos["model", REPO].branches["main"]
    assert rule.hits and set(hub.content("model", REPO)) > {"config.json"}
    rule.times = 0
    assert publish_model(merged, SPEC, store, client(hub)).commit == stored
    assert len(hub.repos["model", REPO].commits) == 2 and hub.count("POST", "/commit/") == 1


def test_a_commit_that_came_in_between_is_seen(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    """Ours names the head that it was compared with: what it deletes or leaves was decided by looking at that one."""
    shard = "model-00003-of-00003.safetensors"
    hub.meanwhile("POST", "/commit/", lambda: hub.add_repo("model", REPO, {shard: b"of another model"}))
    with pytest.raises(UnavailableError, match="412, another commit came in between"):
        publish_model(merged, SPEC, store, client(hub))
    assert store.committed(PublishedModel) == [] and "config.json" not in hub.content("model", REPO)
    publish_model(merged, SPEC, store, client(hub))
    assert set(hub.content("model", REPO)) == {*sent_files(merged), *MADE, ".gitattributes"}


def test_an_interrupted_upload_sends_only_what_is_missing(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    second = files.digest(Path(merged.model_folder) / "model-00002-of-00002.safetensors")
    rule = hub.fail("PUT", f"/storage/{second}", times=1000)
    with pytest.raises(TransientError):
        publish_model(merged, SPEC, store, client(hub))
    assert set(hub.content("model", REPO)) == {".gitattributes"}  # nothing half is visible
    rule.times = 0
    hub.requests.clear()
    publish_model(merged, SPEC, store, client(hub))
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/storage/{second}"]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_tampered_file_is_found(store: ArtifactStore, merged: MergedModel, hub: HubServer, name: str):
    hub.tampered[files.digest(Path(merged.model_folder) / name)] = "f" * 64
    with pytest.raises(CorruptError, match=rf"changed \['{name}'\]") as caught:
        publish_model(merged, SPEC, store, client(hub))
    assert not is_transient(caught.value)
    assert store.committed(PublishedModel) == []


def test_weights_that_a_gitignore_drops_are_missed(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    hub.ignored = {"model-00002-of-00002.safetensors"}
    with pytest.raises(CorruptError, match=r"not stored \['model-00002-of-00002.safetensors'\].*\.gitignore"):
        publish_model(merged, SPEC, store, client(hub))
    assert store.committed(PublishedModel) == []


def test_ignored_files_are_neither_sent_nor_missed(store: ArtifactStore, hub: HubServer):
    def with_rubbish(folder: Path) -> None:
        write_model(folder)
        (folder / "half.tmp").write_bytes(b"rubbish")

    publish_model(make_merged(store, with_rubbish), SPEC, store, client(hub))
    assert "half.tmp" not in hub.content("model", REPO)


def test_the_token_is_nowhere(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    publish_model(merged, SPEC, store, client(hub))
    hub.fail("POST", "/preupload/", times=1000, status=403)
    said = []
    for token in (WRITE, "hf_wrongTokenOfTheTests"):
        with pytest.raises(AccessError) as caught:
            publish_model(merged, PublishSpec(repo_id="ada/other"), store, client(hub, token))
        error: BaseException | None = caught.value
        while error is not None:
            said.append(f"{error!r} {error}")
            error = error.__cause__
    written = [path.read_bytes() for path in store.root.rglob("*") if path.is_file()]
    assert written and caplog.records
    secrets = (WRITE, "hf_wrongTokenOfTheTests")
    assert not [text for text in said for secret in secrets if secret in text]
    assert not [secret for secret in secrets if secret in caplog.text]
    assert not [data for data in written for secret in secrets if secret.encode() in data]
