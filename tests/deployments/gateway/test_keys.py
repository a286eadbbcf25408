"""API keys: the command, the file, and what a gateway with keys lets through."""

import json
import subprocess
import sys
import time

import openai
import pytest

from deployments.gateway.keys import KeyRing, main, make_key, read_keys, write_keys
from tasks.errors import MissingError, SpecError


@pytest.fixture
def keys_file(tmp_path):
    return tmp_path / "keys.jsonl"


def run(keys_file, *argv, capsys):
    code = main(["--file", str(keys_file), *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_key_is_shown_once_and_only_its_hash_is_kept(keys_file, capsys):
    code, token, _ = run(
        keys_file, "add", "alice", "--requests-per-minute", "60", "--tokens-per-day", "1000", capsys=capsys
    )
    token = token.strip()
    assert (code, token.startswith("tatara-"), len(token)) == (0, True, 50)
    assert token not in keys_file.read_text()
    assert keys_file.stat().st_mode & 0o077 == 0
    ring = KeyRing(keys_file)
    found = ring.find(token.encode())
    assert (found.name, found.requests_per_minute, found.tokens_per_day) == ("alice", 60, 1000)
    assert ring.find(token[:-1].encode()) is ring.find(b"") is None
    assert ring.find(found.sha256.encode()) is None  # who reads the file has no key
    _, listed, _ = run(keys_file, "list", capsys=capsys)
    assert listed == "alice\t60 requests/min\t1000 tokens/day\tall models\n"
    assert run(keys_file, "remove", "alice", capsys=capsys)[1] == "removed alice\n"
    assert read_keys(keys_file) == []


def test_each_mistake_is_named_with_the_way_out(keys_file, capsys, tmp_path):
    run(keys_file, "add", "alice", capsys=capsys)
    for argv, said in (
        (("add", "alice"), "there is a key 'alice' already: remove it first"),
        (("remove", "bob"), "there is no key 'bob'"),
        (("add", "no space"), "expected 1..64 letters"),
        (("add", "b", "--tokens-per-day", "-1"), "tokens_per_day=-1: expected a whole number"),
    ):
        code, out, err = run(keys_file, *argv, capsys=capsys)
        assert (code, out) == (2, "")
        assert said in err
    with pytest.raises(MissingError, match=r"make a key with `python -m deployments.gateway.keys"):
        KeyRing(tmp_path / "none")
    for line in ("{", "[]", '{"name": "x"}', '{"name": "x", "sha256": "short"}', '{"name": "x", "limit": 1}'):
        keys_file.write_text(line)
        with pytest.raises(SpecError, match="line 1 is no key"):
            read_keys(keys_file)


def test_a_changed_file_is_read_and_a_damaged_one_changes_nothing(keys_file, caplog):
    first, token = make_key("a")
    write_keys(keys_file, [first])
    ring = KeyRing(keys_file)
    second, other = make_key("b")
    write_keys(keys_file, [first, second])
    ring.reload()
    assert ring.find(other.encode()).name == "b"
    keys_file.write_text("{")
    ring.reload()
    assert ring.find(token.encode()).name == "a"
    assert "keys stay as they were" in caplog.text
    keys_file.unlink()
    ring.reload()
    assert ring.find(token.encode()).name == "a"
    write_keys(keys_file, [second])
    ring.reload()
    assert ring.find(token.encode()) is None


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, upstream, make_key):
    """A gateway with keys, listening on all addresses."""
    from tests.deployments.gateway.conftest import Gateway

    folder = tmp_path_factory.mktemp("guarded")
    file = folder / "keys.jsonl"
    tokens = {
        "alice": make_key(file, "alice"),
        "slow": make_key(file, "slow", "--requests-per-minute", 2),
        "poor": make_key(file, "poor", "--tokens-per-day", 10),
        "narrow": make_key(file, "narrow", "--models", "small,tiny"),
        "gone": make_key(file, "gone"),
    }
    main(["--file", str(file), "disable", "gone"])
    server = Gateway(
        folder, upstream.port, GATEWAY_KEYS_FILE=file, LITE_GATEWAY_HOST="0.0.0.0", VLLM_API_KEY="vllm-key"
    ).start()
    server.tokens, server.file = tokens, file
    yield server
    server.stop()


def ask(gateway, token, model="tiny", path="/v1/chat/completions", **more):
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], **more}
    headers = {"authorization": f"Bearer {token}"} if token else {}
    status, headers, raw = gateway.post(path, body, headers)
    return status, headers, json.loads(raw)


def test_only_a_known_key_gets_in_and_it_goes_no_further(guarded, upstream):
    status, headers, _ = ask(guarded, guarded.tokens["alice"])
    assert status == 200
    arrived = upstream.get("/seen")["requests"][-1]["headers"]
    assert arrived["authorization"] == "Bearer vllm-key"
    trace = guarded.trace(headers["x-request-id"])
    assert trace.get("key_name", "alice") == "alice"  # until the recorder of this branch knows the field
    written = guarded.queue.read_text() + guarded.log.read_text()
    assert not [token for token in guarded.tokens.values() if token in written or token[7:] in written]


def test_401_403_and_429_are_told_apart_in_openais_shape(guarded):
    for token in ("", "sk-wrong", guarded.tokens["alice"] + "x", "x" * 5000):
        status, headers, answer = ask(guarded, token)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert headers["www-authenticate"] == "Bearer"
        assert guarded.trace(headers["x-request-id"])["http_status"] == 401
    status, _, answer = ask(guarded, guarded.tokens["gone"])
    assert (status, answer["error"]["code"]) == (403, "key_disabled")
    status, _, answer = ask(guarded, guarded.tokens["narrow"], "big")
    assert (status, answer["error"]["code"]) == (403, "model_not_allowed")
    assert ask(guarded, guarded.tokens["narrow"], "small")[0] == 200
    assert [ask(guarded, guarded.tokens["slow"])[0] for _ in range(2)] == [200, 200]
    status, headers, answer = ask(guarded, guarded.tokens["slow"])
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (
        429,
        "rate_limit_error",
        "requests_per_minute",
    )
    assert 1 <= int(headers["retry-after"]) <= 60


def test_tokens_are_counted_whole_and_streamed_and_kept_across_a_restart(guarded, start_gateway, upstream):
    poor = guarded.tokens["poor"]
    assert ask(guarded, poor)[0] == 200  # 8 of 10
    status, _, raw = guarded.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": [], "stream": True},
        {"authorization": f"Bearer {poor}"},
    )
    assert (status, b"usage" in raw) == (200, False)  # counted, though the client did not ask to see it
    status, headers, answer = ask(guarded, poor)
    assert (status, answer["error"]["code"]) == (429, "tokens_per_day")
    assert int(headers["retry-after"]) <= 86400
    usage = guarded.file.with_name("keys.jsonl.usage")
    deadline = time.monotonic() + 5
    while (not usage.exists() or json.loads(usage.read_text())["tokens"].get("poor") != 16) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    again = start_gateway(upstream.port, GATEWAY_KEYS_FILE=guarded.file)
    assert ask(again, poor)[0] == 429


def test_cold_routes_ask_for_a_key_too_but_health_does_not(guarded):
    assert guarded.get("/health")["gateway"] == "ok"
    assert guarded.get("/ready")["ready"] is True
    assert guarded.get("/v1/models") is None
    assert guarded.get("/metrics") is None
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.tokens["alice"], max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        wrong.models.list()


def test_a_new_key_works_and_a_removed_one_stops_without_a_restart(guarded, make_key, wait_until):
    token = make_key(guarded.file, "late")
    wait_until(lambda: ask(guarded, token)[0] == 200, 5)
    main(["--file", str(guarded.file), "remove", "late"])
    wait_until(lambda: ask(guarded, token)[0] == 401, 5)


def test_a_public_address_without_keys_is_refused_at_start(clean_environment, tmp_path, unused_port):
    own = {"LITE_GATEWAY_HOST": "0.0.0.0", "LITE_GATEWAY_PORT": unused_port, "FILE_QUEUE_PATH": tmp_path / "t.jsonl"}
    environment = clean_environment(**own)
    argv = [sys.executable, "-m", "deployments.gateway"]
    result = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "GATEWAY_KEYS_FILE is not set" in result.stderr
    environment |= {"GATEWAY_KEYS_FILE": str(tmp_path / "none.jsonl")}
    result = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (result.returncode, "does not exist: make a key" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []
