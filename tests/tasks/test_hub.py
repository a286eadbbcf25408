"""What the Hub answers, and which error of ours it becomes."""

import pytest
from huggingface_hub import HfApi, constants

from tasks.errors import AccessError, CapacityError, MissingError, TataraError, TransientError, is_transient
from tasks.hub import hub_errors, pin_commit, require_writer
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
    assert require_writer(client(hub), "asking") == "ada"
    assert require_writer(client(hub, NOBODY), "asking") == "eve"  # fine-grained: known when it writes
    with pytest.raises(AccessError, match="asking: 403, the token of ada is read-only; it needs write access"):
        require_writer(client(hub, READ), "asking")
    with pytest.raises(AccessError, match="asking: 401, the token is wrong or expired"):
        require_writer(client(hub, "hf_wrong"), "asking")


def test_other_errors_pass_unchanged():
    for error in (CapacityError("no room"), KeyError("ours"), RuntimeError("ours too")):
        with pytest.raises(type(error)) as caught, hub_errors("doing"):
            raise error
        assert caught.value is error


def test_the_cause_decides_behind_the_clients_wrapping():
    with pytest.raises(TransientError, match="can't be reached"), hub_errors("doing"):
        raise RuntimeError("Error while uploading 'a' to the Hub.") from ConnectionResetError()
    with pytest.raises(TransientError), hub_errors("doing"):
        raise OSError("Consistency check failed: file should be of size 10 but has size 3")
