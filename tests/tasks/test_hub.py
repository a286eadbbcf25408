"""What the Hub answers, and which error of ours it becomes."""

import pytest
from huggingface_hub import HfApi, constants

from tasks.errors import (
    AccessError,
    CapacityError,
    MissingError,
    RateLimitError,
    RightsError,
    SpecError,
    TataraError,
    TokenError,
    TransientError,
    UnavailableError,
    is_transient,
)
from tasks.hub import find_repo, hub_errors, pin_commit, require_target
from tasks.specs import PublishSpec
from tests.hub_server import (
    NOBODY,
    READ,
    WRITE,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)


def client(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_a_branch_is_pinned_to_its_commit(hub: HubServer):
    repo = hub.add_repo("dataset", "ada/rows", {"a.txt": b"1"})
    first = repo.branches["main"]
    hub.add_repo("dataset", "ada/rows", {"a.txt": b"2"})
    assert pin_commit(client(hub), "ada/rows", "main", "dataset") == repo.branches["main"] != first
    assert pin_commit(client(hub), "ada/rows", first, "dataset") == first


@pytest.mark.parametrize(
    ("token", "repo_id", "revision", "kind", "message"),
    [
        (WRITE, "ada/none", "main", MissingError, "model ada/none@main: 404, it does not exist"),
        (False, "ada/none", "main", AccessError, "401, it is not there or this token may not see it"),
        (WRITE, "ada/open", "v9", MissingError, "model ada/open@v9: no such revision"),
        ("hf_wrong", "ada/open", "main", AccessError, "401, the token is wrong or expired"),
        (False, "ada/secret", "main", AccessError, "401, it is not there or this token may not see it"),
        (NOBODY, "ada/secret", "main", MissingError, r"404, it does not exist \(or is private"),
        (NOBODY, "ada/gated", "main", AccessError, "gated; accept its terms"),
        (False, "ada/gated", "main", AccessError, "gated; accept its terms"),
    ],
)
def test_what_may_not_be_read_is_named(
    hub: HubServer, token: str | bool, repo_id: str, revision: str, kind: type[TataraError], message: str
):
    hub.add_repo("model", "ada/open", {})
    hub.add_repo("model", "ada/secret", {}, private=True)
    hub.add_repo("model", "ada/gated", {}, gated=True)
    with pytest.raises(kind, match=message) as caught:
        pin_commit(client(hub, token), repo_id, revision, "model")
    assert not is_transient(caught.value)


def test_who_accepted_the_terms_may_pin_a_gated_model(hub: HubServer):
    repo = hub.add_repo("model", "ada/gated", {}, gated=True)
    assert pin_commit(client(hub, READ), "ada/gated", "main", "model") == repo.branches["main"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 0])
def test_weather_is_transient(hub: HubServer, status: int):
    hub.add_repo("model", "ada/open", {})
    hub.fail("GET", "/revision/", times=100, status=status)
    with pytest.raises(TransientError, match="model ada/open@main: the Hub") as caught:
        pin_commit(client(hub), "ada/open", "main", "model")
    assert is_transient(caught.value)


@pytest.mark.parametrize("status", [400, 402, 409, 422])
def test_a_refusal_is_final_and_says_the_status(hub: HubServer, status: int):
    hub.fail("GET", "/revision/", status=status)
    with pytest.raises(AccessError, match=rf"the Hub refused with {status} \(weather\)"):
        pin_commit(client(hub), "ada/open", "main", "model")


def test_offline_mode_is_final(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set"):
        pin_commit(client(hub), "ada/open", "main", "model")


def test_the_writer_is_named(hub: HubServer):
    def target(token: str) -> str:
        return require_target(client(hub, token), "ada/new", "asking", private=True)

    assert target(WRITE) == "ada"
    with pytest.raises(AccessError, match="asking: 403, the token of ada is read-only; it needs write access"):
        target(READ)
    with pytest.raises(AccessError, match="asking: 401, the token is wrong or expired"):
        target("hf_wrong")
    with pytest.raises(
        AccessError, match=r"403, ada/new is not there and can't be made: the token is of eve, who is in"
    ):
        target(NOBODY)


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("ada/private", ""),
        ("lab/new", ""),
        ("Lab/private", ""),
        ("ada/public", r"asking: the repo exists and is public, but PublishSpec\.private is true: make it private"),
        ("reading/new", r"403, reading/new is not there and can't be made: ada's role in reading is read; choose"),
        ("reading/private", r"asking: 403, the token is valid but lacks this right; it needs write access"),
        ("eve/new", r"403, eve/new is not there and can't be made: the token is of ada, who is in lab, reading"),
        ("eve/public", r"the repo exists and is public"),
        ("eve/private", r"asking: 403, the token is valid but lacks this right"),
    ],
)
def test_where_one_may_publish_is_known_without_creating_anything(hub: HubServer, repo_id: str, message: str):
    hub.orgs["ada"] = {"lab": "contributor", "reading": "read"}
    for name in ("ada/private", "Lab/private", "reading/private", "eve/private", "ada/public", "eve/public"):
        hub.add_repo("model", name, {}, private=name.endswith("/private"))
    hub.orgs["ada"]["Lab"] = "write"
    before = set(hub.repos)
    if message:
        with pytest.raises(AccessError, match=message) as caught:
            require_target(client(hub), repo_id, "asking", private=True)
        assert not is_transient(caught.value)
    else:
        assert require_target(client(hub), repo_id, "asking", private=True) == "ada"
    assert hub.writes() == [] and set(hub.repos) == before


def test_a_public_repo_will_do_when_that_is_wanted(hub: HubServer):
    hub.add_repo("model", "ada/public", {})
    assert require_target(client(hub), "ada/public", "asking", private=False) == "ada"


@pytest.mark.parametrize(
    ("kind", "name", "permissions", "may"),
    [
        ("user", "eve", ["repo.content.read", "repo.write"], True),
        ("user", "eve", ["repo.content.read"], False),
        ("org", "lab", ["repo.write"], False),
        ("model", "eve/other", ["repo.write"], False),
        ("resource-group", "", ["repo.write"], True),  # whose repos it covers is not told: the upload will
    ],
)
def test_a_fine_grained_token_shows_where_it_may_write(
    hub: HubServer, kind: str, name: str, permissions: list[str], may: bool
):
    hub.scopes[NOBODY] = [{"entity": {"type": kind, "name": name}, "permissions": permissions}]
    if may:
        assert require_target(client(hub, NOBODY), "eve/new", "asking", private=True) == "eve"
    else:
        with pytest.raises(AccessError, match="the fine-grained token has no write access to the repos of eve; choose"):
            require_target(client(hub, NOBODY), "eve/new", "asking", private=True)


def test_a_hub_without_the_question_leaves_the_answer_to_the_upload(hub: HubServer):
    hub.add_repo("model", "ada/private", {}, private=True)
    hub.fail("GET", "/auth-check/write$", status=404)
    assert require_target(client(hub), "ada/private", "asking", private=True) == "ada"


@pytest.mark.parametrize("name", ["no owner", "no-owner", "a/b/c", "a/b--c", "a/b.git", "a/.b"])
def test_a_repo_name_of_wrong_form_is_refused_wherever_it_comes_from(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_REPO_NAME", name)
    with pytest.raises(SpecError, match=rf"^HF_REPO_NAME = '{name}' is not owner/name: "):
        find_repo(PublishSpec())
    assert find_repo(PublishSpec(repo_id="ada/tuned")) == "ada/tuned"
    monkeypatch.delenv("HF_REPO_NAME")
    assert find_repo(PublishSpec()) == ""


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "pretrain:x"])
def test_what_can_be_no_repo_is_a_wrong_knob(hub: HubServer, name: str):
    with pytest.raises(
        SpecError, match=rf"model {name}@main: that is no name of a Hub repository, expected owner/name"
    ):
        pin_commit(client(hub), name, "main", "model")
    assert hub.requests == []


def test_other_errors_pass_unchanged():
    for error in (CapacityError("no room"), KeyError("ours"), RuntimeError("ours too")):
        with pytest.raises(type(error)) as caught, hub_errors("doing"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("Network error: Request error: HTTP status client error (401 Unauthorized), domain: http://h/", TokenError),
        ("Network error: Request error: HTTP status client error (403 Forbidden), domain: http://h/", RightsError),
        ("Network error: Request error: HTTP status client error (404 Not Found), domain: http://h/", AccessError),
        ("Rate limited: Request error: HTTP status client error (429 Too Many Requests), domain: h", RateLimitError),
        (
            "Server error: Request error: HTTP status server error (503 Service Unavailable), domain: h",
            UnavailableError,
        ),
        ("Network error: Request error: error decoding response body, domain: no-url", TransientError),
    ],
)
def test_a_refusal_that_xet_calls_a_connection_error(told: str, kind: type[TataraError]):
    """Texts of hf_xet 1.8.0, as it raised them against the loopback Hub."""
    with pytest.raises(kind) as caught, hub_errors("doing"):
        raise ConnectionError(told)
    assert type(caught.value) is kind


def test_the_cause_decides_behind_the_clients_wrapping():
    with pytest.raises(TransientError, match="can't be reached"), hub_errors("doing"):
        raise RuntimeError("Error while uploading 'a' to the Hub.") from ConnectionResetError()
    with pytest.raises(TransientError), hub_errors("doing"):
        raise OSError("Consistency check failed: file should be of size 10 but has size 3")
