"""The same against a real S3 client and an S3 on loopback (moto), with its accounts, its faults and its races."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from blocks.storage import ArtifactStorage
from tasks import files
from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks.check.run import check_storage
from tasks.errors import MissingError, RightsError, TataraError, TokenError, TransientError
from tasks.remote import Remote
from tests.tasks.test_artifacts import KEY, Knobs, _commit, _dataset

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
        store = _store(tmp_path / name, server.all, url)
        with store.claim(FetchedDataset, KEY) as claim:
            if claim.found:
                return claim.found
            files.write_text(claim.folder / "train.parquet", f"rows of {name}")
            made = _dataset(KEY, claim.folder).model_copy(update={"source": name})
            return claim.commit(made, spec=Knobs())

    names = [f"m{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        made = list(pool.map(make, names))
    winners = {dataset.source for dataset in made}
    assert len(winners) == 1
    rows = {(tmp_path / name / "dataset" / KEY[:16] / "train.parquet").read_text() for name in names}
    assert rows == {f"rows of {winners.pop()}"}


@pytest.mark.parametrize(
    ("options", "url", "error", "message"),
    [
        ({"key": "AKIAWRONG", "secret": "verysecret"}, URL, RightsError, "the account must list, read, write"),
        ({"secret": "verysecret"}, URL, RightsError, "the account must list, read, write"),
        ("reads", URL, RightsError, "the account must list, read, write"),
        ({}, "s3://nowhere/team", MissingError, "make the bucket first"),
    ],
    ids=["unknown key", "wrong secret", "may only read", "no bucket"],
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
        with pytest.raises(TransientError, match="s3://furnace/team"):  # Prefect tries again
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
