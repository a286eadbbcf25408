"""The same against a real S3 client and an S3 on loopback (moto), with its accounts, its faults and its races."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from blocks.storage import ArtifactStorage
from tasks import files
from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks.check.run import check_storage
from tasks.errors import MissingError, RightsError, SpecError, TataraError, TokenError, TransientError
from tasks.remote import Remote
from tests.tasks.test_artifacts import KEY, Knobs, _commit, _dataset, _make_rows

pytestmark = pytest.mark.long
URL = "s3://furnace/team"
_READS = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}


class Server:
    """moto's S3, which knows one account that may do all and one that may only read."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address, self._log = f"http://127.0.0.1:{self.port}", log
        self.start()

    def start(self) -> None:
        """Start it empty, make the bucket and the accounts, then ask for credentials."""
        with self._log.open("a") as log:
            argv = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
            variables = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "7"}
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=variables)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline and self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        client: dict[str, Any] = {"endpoint_url": self.address, "region_name": "us-east-1"}
        client |= {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        boto3.client("s3", **client).create_bucket(Bucket="furnace")
        iam = boto3.client("iam", **client)
        self.all, self.reads = (
            self._account(iam, "all", {**_READS, "Action": "s3:*"}),
            self._account(iam, "reads", _READS),
        )

    def _account(self, iam: Any, name: str, statement: dict[str, Any]) -> dict[str, Any]:
        iam.create_user(UserName=name)
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"key": key["AccessKeyId"], "secret": key["SecretAccessKey"], "endpoint_url": self.address}

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/moto-api/", timeout=2).status_code > 0
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


class Between:
    """A proxy that lets a person's store differ from moto's: `answer` gets each request's method, path and headers.

    It may return the status that is sent in place of moto's.
    """

    def __init__(self, server: Server, answer: Callable[[str, str, dict[str, str]], int | None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                headers = dict(self.headers.items())
                if headers.get("Expect"):
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(int(headers.get("Content-Length", 0)))
                status = answer(self.command, self.path, headers)
                if status is None:
                    there = HTTPConnection("127.0.0.1", server.port)
                    there.request(self.command, self.path, body, headers)
                    reply = there.getresponse()
                    status, sent, content = reply.status, dict(reply.getheaders()), reply.read()
                else:
                    sent, content = {}, b"<Error><Code>%d</Code><Message>no</Message></Error>" % status
                self.send_response_only(status)
                length = sent.pop("Content-Length", str(len(content)))
                sent.pop("Transfer-Encoding", None)
                for name, value in {**sent, "Content-Length": length}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.options = {**server.all, "endpoint_url": f"http://127.0.0.1:{self._proxy.server_address[1]}"}

    def __enter__(self) -> "Between":
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("s3") / "moto.log")
    yield made
    made.stop()


def _store(root: Path, options: dict[str, Any], url: str = URL) -> ArtifactStore:
    return ArtifactStore(root, Remote(url, {**options, "skip_instance_cache": True}))


def test_an_artifact_travels_by_s3_also_one_of_several_parts(server: Server, tmp_path: Path):
    here, there = _store(tmp_path / "a", server.all), _store(tmp_path / "b", server.all)
    assert "takes and returns files" in check_storage(here)
    big = os.urandom(1 << 20) * 130
    with here.claim(FetchedDataset, KEY) as claim:
        files.write_bytes(claim.folder / "train.parquet", big)  # more than one PUT takes
        files.write_bytes(claim.folder / "empty.jsonl", b"")
        claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
    assert [dataset.key for dataset in there.known(FetchedDataset)] == [KEY]
    with there.claim(FetchedDataset, KEY) as claim:
        assert claim.found and (claim.folder / "train.parquet").read_bytes() == big
        assert (claim.folder / "empty.jsonl").read_bytes() == b""


def test_two_machines_at_once_agree_on_one(server: Server, tmp_path: Path):
    url = f"{URL}/race"

    def make(name: str) -> FetchedDataset:
        return _make_rows(_store(tmp_path / name, server.all, url), f"rows of {name}")

    names = [f"m{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        made = list(pool.map(make, names))
    winners = {dataset.source for dataset in made}
    assert len(winners) == 1
    rows = {(tmp_path / name / "dataset" / KEY[:16] / "train.parquet").read_text() for name in names}
    assert rows == winners


@pytest.mark.parametrize(
    ("options", "url", "error", "message"),
    [
        ({"key": "AKIAWRONG", "secret": "verysecret"}, URL, RightsError, "the account must list, read, write"),
        ({"secret": "verysecret"}, URL, RightsError, "the account must list, read, write"),
        ("reads", URL, RightsError, "the account must list, read, write"),
        ({}, "s3://nowhere/team", MissingError, "make the bucket first"),
        ({"secrett": "s"}, URL, SpecError, "keyword argument 'secrett': look at the URL and at the block's options"),
        ({"endpoint_url": "127.0.0.1:9000"}, URL, SpecError, "Invalid endpoint: 127.0.0.1:9000"),
    ],
    ids=["unknown key", "wrong secret", "may only read", "no bucket", "unknown option", "no URL"],
)
def test_before_a_run_it_is_said_what_is_wrong(
    server: Server, tmp_path: Path, options: Any, url: str, error: type[TataraError], message: str
):
    given = server.reads if options == "reads" else {**server.all, **options}
    with pytest.raises(error, match=message) as refused:
        check_storage(_store(tmp_path, given, url))
    assert given["secret"] not in str(refused.value)


def test_no_credentials_at_all_are_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(TokenError, match="AWS_ACCESS_KEY_ID"):
        check_storage(_store(tmp_path, {"endpoint_url": server.address, "anon": False}))


def test_while_it_is_away_the_artifact_is_whole_here_and_the_next_try_sends_it(tmp_path: Path):
    server = Server(tmp_path / "moto.log")
    store = _store(tmp_path / "a", server.all)
    with store.claim(FetchedDataset, KEY) as claim:
        files.write_text(claim.folder / "train.parquet", "rows")
        server.stop()
        with pytest.raises(TransientError, match=r"s3://furnace/team.*AWS_ENDPOINT_URL"):  # Prefect tries again
            claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
    server.start()
    try:
        store = _store(tmp_path / "a", server.all)
        with store.claim(FetchedDataset, KEY) as claim:
            assert claim.found
        with _store(tmp_path / "b", server.all).claim(FetchedDataset, KEY) as claim:
            assert claim.found and (claim.folder / "train.parquet").read_text() == "rows"
    finally:
        server.stop()


def test_the_block_opens_it_and_hides_the_secret(server: Server, tmp_path: Path):
    block = ArtifactStorage(root=str(tmp_path / "a"), remote=f"{URL}/block", remote_options=server.all)  # type: ignore[arg-type]
    assert server.all["secret"] not in repr(block)
    _commit(block.store())
    assert _store(tmp_path / "b", server.all, f"{URL}/block").known(FetchedDataset)


def _is_announcement(method: str, path: str) -> bool:
    return method == "PUT" and path.endswith("manifest.json")


@pytest.mark.parametrize("status", [400, 405, 501])
def test_a_store_without_conditional_writes_takes_artifacts_all_the_same(server: Server, tmp_path: Path, status: int):
    def answer(method: str, path: str, headers: dict[str, str]) -> int | None:
        return status if "If-None-Match" in headers and _is_announcement(method, path) else None

    url = f"{URL}/without-{status}"
    with Between(server, answer) as between:
        made = _make_rows(_store(tmp_path / "a", between.options, url), "rows")
        assert _make_rows(_store(tmp_path / "b", between.options, url), "").source == made.source == "rows"


def test_a_busy_store_is_tried_again_and_not_written_over_what_came_in_between(server: Server, tmp_path: Path):
    """503 to the manifest that must be the first: written without that, it would end another machine's."""
    url, writes = f"{URL}/busy", list[bool]()

    def answer(method: str, path: str, headers: dict[str, str]) -> int | None:
        if not _is_announcement(method, path):
            return None
        writes.append("If-None-Match" in headers)
        return 503 if writes[-1] else None

    with Between(server, answer) as between, pytest.raises(TransientError, match="sending to"):
        _make_rows(_store(tmp_path / "a", between.options, url), "rows of a")
    assert writes and all(writes)
    assert _make_rows(_store(tmp_path / "b", server.all, url), "rows of b").source == "rows of b"
    assert _make_rows(_store(tmp_path / "a", server.all, url), "").source == "rows of b"


def test_two_that_both_were_the_first_agree_from_the_next_step_on(server: Server, tmp_path: Path):
    """A store that ignores the condition, and a rival between our look and our write."""
    url = f"{URL}/both"
    rival = _store(tmp_path / "b", server.all, url)
    went = list[str]()

    def answer(method: str, path: str, headers: dict[str, str]) -> int | None:
        if _is_announcement(method, path) and not went:
            went.append(_make_rows(rival, "rows of b").source)
            keys = {"aws_access_key_id": server.all["key"], "aws_secret_access_key": server.all["secret"]}
            client = boto3.client("s3", endpoint_url=server.address, region_name="us-east-1", **keys)
            client.delete_object(Bucket="furnace", Key=path.split("?")[0].removeprefix("/furnace/"))  # written over
        return None

    with Between(server, answer) as between:
        here = _store(tmp_path / "a", between.options, url)
        assert _make_rows(here, "rows of a").source == "rows of a"
        assert went == ["rows of b"]
        assert _make_rows(rival, "").source == _make_rows(here, "").source == "rows of a"
    paths = [tmp_path / name / "dataset" / KEY[:16] / "train.parquet" for name in ("a", "b")]
    assert [path.read_text() for path in paths] == ["rows of a"] * 2


@pytest.mark.parametrize("name", ["a#b", "100%25", "which?", "tea time", "祭り", "émile&co+1"])
def test_names_that_a_url_would_read_otherwise(server: Server, tmp_path: Path, name: str):
    url = f"{URL}/{name.replace('?', '')}"
    here, there = _store(tmp_path / "a", server.all, url), _store(tmp_path / "b", server.all, url)
    for store in (here, there):
        with store.claim(FetchedDataset, KEY) as claim:
            if not claim.found:
                files.write_text(claim.folder / name / f"{name}.jsonl", name)
                claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
            assert (claim.folder / name / f"{name}.jsonl").read_text() == name
    assert len(there.known(FetchedDataset)) == 1


def test_no_secret_reaches_a_log_a_manifest_or_an_error(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    url = f"{URL}/logged"
    made = _make_rows(_store(tmp_path / "a", server.all, url), "rows")
    _make_rows(_store(tmp_path / "b", server.all, url), "")
    with pytest.raises(RightsError) as refused:
        _make_rows(_store(tmp_path / "c", server.reads, f"{url}2"), "rows")
    said = [caplog.text, str(refused.value), repr(refused.value.__cause__), repr(Remote(url, server.all))]
    said += [path.read_text() for path in made.path.rglob("*.json")]
    client = _store(tmp_path, server.all, url).remote
    assert client
    said.append(json.dumps(client.read(f"dataset/{KEY[:16]}")))
    for account in (server.all, server.reads):
        assert not [text for text in said if account["secret"] in text]


def test_it_can_be_asked_from_a_thread_of_a_running_loop(server: Server, tmp_path: Path):
    """As Prefect's tasks are: in the loop's own thread, and in a worker thread beside it."""
    store = _store(tmp_path / "a", server.all, f"{URL}/loop")

    async def ask() -> list[str]:
        first = _make_rows(store, "rows").source
        return [first, (await asyncio.to_thread(_make_rows, store, "")).source]

    assert asyncio.run(ask()) == ["rows", "rows"]
