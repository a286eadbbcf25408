import pytest, traceback
from huggingface_hub import HfApi
from tasks.publish.run import publish_model
from tasks.specs import *
from tests.hub_server import *
from tests.hub_server import hub_fixture
from tests.tasks.publish.conftest import *

S = PublishSpec(repo_id="ada/tuned")


def test_first(store, merged, hub):
    a = publish_model(merged, S, store, HfApi(endpoint=hub.url, token=WRITE))
    print(a)
    print(hub.requests)


@pytest.mark.parametrize(
    "rule",
    [
        ("PUT", "/storage", dict(times=9)),
        ("PUT", "/storage", dict(times=9, status=0)),
        ("POST", "/commit/", dict(times=9)),
        ("POST", "/commit/", dict(status=403)),
        ("POST", "/commit/", dict(status=0)),
        ("POST", "/preupload", dict(times=99, status=0)),
        ("GET", "whoami", dict(status=0)),
        ("GET", "whoami", dict(status=429)),
        ("GET", "/tree/", dict(times=9)),
    ],
)
@pytest.mark.parametrize("xet", [0, 1])
def test_fail(store, merged, hub, rule, xet, monkeypatch):
    from huggingface_hub import constants

    if xet:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail(*rule[:2], **rule[2])
    try:
        publish_model(merged, S, store, HfApi(endpoint=hub.url, token=WRITE))
    except Exception as e:
        print("RESULT", xet, rule, type(e).__mro__[:3], str(e)[:150], "cause", repr(e.__cause__)[:100])
    else:
        print("RESULT", xet, rule, "OK")


@pytest.mark.parametrize(
    "rule",
    [
        ("GET", "xet-write", dict(times=99)),
        ("GET", "xet-write", dict(times=9, status=0)),
        ("GET", "xet-write", dict(times=99, status=403)),
        ("GET", "xet-write", dict(times=99, status=401)),
    ],
)
def test_xet(store, merged, hub, rule, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail(*rule[:2], **rule[2])
    t = time.time()
    try:
        publish_model(merged, S, store, HfApi(endpoint=hub.url, token=WRITE))
    except Exception as e:
        print("RESULT xet", time.time() - t, rule, type(e).__mro__[:3], str(e)[:350], "cause", repr(e.__cause__)[:100])
    else:
        print("RESULT", rule, "OK")
