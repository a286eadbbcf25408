"""Which Prefect is meant, what is said when it can't start, and what is left alone."""

import importlib
import inspect
import os
import sys
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from pydantic import BaseModel

from deployments import orchestration as subject
from deployments.lost_runs import settle_lost_runs
from tasks import files, processes, procfs
from tasks.errors import PortTakenError, ServiceError


def test_without_a_server_given_our_own_is_meant(tmp_path: Path):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PATH": "/bin", "PYTHONPATH": "/mine"})
    assert (prefect.api_url, prefect.ui_url) == ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200")
    assert prefect.is_ours and prefect.home == tmp_path / "prefect"
    expected = {
        "PATH": "/bin",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TATARA_CHECKOUT": str(subject.ROOT),
        "TATARA_HOME": str(tmp_path),
        "PYTHONPATH": f"{subject.ROOT}{os.pathsep}/mine",
    }
    assert {name: prefect.variables.get(name) for name in expected} == expected


def test_given_server_is_used_and_the_users_profile_left_alone(tmp_path: Path):
    given = {"TATARA_HOME": str(tmp_path), "PREFECT_API_URL": "https://api.example/api", "PREFECT_API_KEY": "pnu_x"}
    prefect = subject.find_prefect(given)
    assert (prefect.api_url, prefect.is_ours) == ("https://api.example/api", False)
    assert "PREFECT_HOME" not in prefect.variables
    assert prefect.variables["PREFECT_API_KEY"] == "pnu_x"
    assert "pnu_x" not in repr(prefect)


def test_port_and_home_follow_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prefect = subject.find_prefect({"PREFECT_SERVER_API_PORT": "4321"})
    assert (prefect.api_url, prefect.home) == ("http://127.0.0.1:4321/api", tmp_path / ".tatara/prefect")


def test_commands_are_of_this_environment(tmp_path: Path):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path)})
    assert prefect.command("deploy", "--all") == [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    assert prefect.identity("worker") == tmp_path / "prefect/worker.json"


class _Other(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def other_program() -> Iterator[int]:
    """A port on which a web server that is not Prefect's answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_taken_port_is_named_before_anything_starts(tmp_path: Path, other_program: int):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": str(other_program)})
    assert not subject.is_answering(prefect)
    with pytest.raises(
        PortTakenError, match=f"port {other_program} belongs to another program, .*PREFECT_SERVER_API_PORT"
    ):
        subject.start_server(prefect)
    assert not (tmp_path / "prefect").exists()


def test_given_server_that_is_away_is_named(tmp_path: Path, free_port: int):
    url = f"http://127.0.0.1:{free_port}/api"
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_API_URL": url})
    with pytest.raises(ServiceError, match=f"PREFECT_API_URL {url} does not answer: start that server, or unset it"):
        subject.start_server(prefect)


def test_is_taken(other_program: int, free_port: int):
    assert subject.is_taken(other_program)
    assert not subject.is_taken(free_port)


class _Knowing(_Other):
    """A Prefect server, which is not ours, that has both pools and all deployments."""

    def do_GET(self) -> None:
        self._answer(b'{"name": "x"}' if self.path in ("/api/work_pools/local", "/api/work_pools/gpu") else None)

    def do_POST(self) -> None:
        self._answer(b"%d" % subject.NUM_DEPLOYMENTS if self.path == "/api/deployments/count" else None)

    def _answer(self, body: bytes | None) -> None:
        if self.headers["Authorization"] != "Bearer pnu_x":
            self.send_error(401)
            return
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")


@pytest.fixture
def knowing_server(free_port: int) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", free_port), _Knowing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{free_port}/api"
    server.shutdown()
    server.server_close()


def test_deployments_are_made_once_for_the_same_sources(tmp_path: Path, knowing_server: str):
    given = {"TATARA_HOME": str(tmp_path), "PREFECT_API_URL": knowing_server, "PREFECT_API_KEY": "pnu_x"}
    prefect = subject.find_prefect(given)
    elsewhere = subject.find_prefect({**given, "PREFECT_API_URL": "http://127.0.0.1:4999/api"})
    wanted = subject._deployed_digest(prefect)
    assert wanted == subject._deployed_digest(prefect) != subject._deployed_digest(elsewhere)
    files.write_json(prefect.home / "deployed.json", wanted)
    assert subject.deploy(prefect) is False  # Prefect's command line is not called: it would fail here


def test_refused_login_is_named(tmp_path: Path, knowing_server: str):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_API_URL": knowing_server})
    with pytest.raises(ServiceError, match=r"can't be asked for its pools \(HTTP Error 401.*PREFECT_API_KEY"):
        subject.deploy(prefect)


def test_every_file_that_shapes_a_form_makes_it_anew():
    """The models in the flows' parameters, and those inside them, are defined in files that the digest covers."""
    found: set[Path] = set()
    for deployment in yaml.safe_load((subject.ROOT / "prefect.yaml").read_text())["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        found.add(Path(inspect.getfile(module)))
        flow = getattr(module, name)
        todo = [parameter.annotation for parameter in inspect.signature(flow.fn, eval_str=True).parameters.values()]
        while todo:
            kind = todo.pop()
            todo += getattr(kind, "__args__", ())
            defined = sys.modules.get(getattr(kind, "__module__", ""), None)
            if defined and str(getattr(defined, "__file__", "")).startswith(str(subject.ROOT / "tasks")):
                found.add(Path(str(defined.__file__)))
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                todo += [field.annotation for field in kind.model_fields.values()]
    sources = set(subject.list_schema_sources())
    assert {"specs.py", "spec.py"} <= {path.name for path in found}
    assert found <= sources
    assert {subject.ROOT / "prefect.yaml", subject.ROOT / "flows/recipes.py"} <= sources


def test_address_that_we_told_to_export_is_still_ours(tmp_path: Path, free_port: int):
    """`tatara up` prints `export PREFECT_API_URL=...`: after `tatara down` that shell must be able to start it."""
    url = f"http://127.0.0.1:{free_port}/api"
    exported = {"TATARA_HOME": str(tmp_path), "PREFECT_API_URL": url}
    assert not subject.find_prefect(exported).is_ours  # never started by us
    files.write_json(tmp_path / "prefect/address.json", url)
    for shell in (exported, {**exported, "PREFECT_API_URL": f"http://localhost:{free_port}/api/"}):
        prefect = subject.find_prefect(shell)
        assert prefect.is_ours and prefect.variables["PREFECT_HOME"] == str(tmp_path / "prefect")
    server = ThreadingHTTPServer(("127.0.0.1", free_port), _Other)  # somebody else's is there now
    try:
        assert not subject.find_prefect(exported).is_ours
    finally:
        server.server_close()


def test_server_and_commands_see_no_secret_but_prefects(tmp_path: Path):
    given = {"TATARA_HOME": str(tmp_path), "HF_TOKEN": "hf_x", "PREFECT_API_KEY": "pnu_x", "PATH": "/bin"}
    prefect = subject.find_prefect(given)
    assert "HF_TOKEN" not in prefect.client_variables
    assert prefect.client_variables["PREFECT_API_KEY"] == "pnu_x"
    assert prefect.variables["HF_TOKEN"] == "hf_x"  # the worker's: flows publish with it


def test_worker_that_dies_is_told_with_its_last_lines(tmp_path: Path, free_port: int):
    given = {**os.environ, "TATARA_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "nonsense"}
    prefect = subject.find_prefect({**given, "PREFECT_API_URL": f"http://127.0.0.1:{free_port}/api"})
    message = r"Prefect's worker died after it was started; the end of .*worker\.log:\n(.|\n)*NONSENSE"
    with pytest.raises(ServiceError, match=message):
        subject.start_worker(prefect)


def test_busy_server_is_asked_again_and_a_refusal_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = [503, 429, 200, 500]

    class Busy(_Other):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answers.pop(0))
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(subject.time, "sleep", lambda _: None)
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": str(server.server_port)})
    try:
        assert subject.call(prefect, "/flow_runs/filter", {}) == {}
        with pytest.raises(urllib.error.HTTPError, match="500"):
            subject.call(prefect, "/flow_runs/filter", {})
        answers[:] = [503] * 9
        with pytest.raises(urllib.error.HTTPError, match="503"):
            subject.call(prefect, "/flow_runs/filter", {}, tries=3)
        assert len(answers) == 6
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subject.Prefect]:
    """Something that runs as our worker, with a child as a flow run is one."""
    monkeypatch.setattr(subject, "_IDLE_TIMEOUT_S", 0.3)
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    program = processes.Program(
        argv=("sh", "-c", "sleep 60 & wait"),
        variables={**prefect.variables, "HF_TOKEN": "old", "SHLVL": "7"},
        identity_file=prefect.identity("worker"),
        log=tmp_path / "log",
        digest="as it was",
    )
    processes.start_detached(program)
    yield prefect
    subject.stop(prefect)


def test_worker_at_work_is_not_stopped_for_a_new_variable(working: subject.Prefect):
    running = processes.find_alive(working.identity("worker"))
    assert running is not None
    while len(processes.find_members(working.identity("worker"), running)) < 2:
        pass
    with pytest.raises(
        ServiceError, match=r"runs a flow in the environment of its start, and since then HF_TOKEN changed"
    ):
        subject.start_worker(working)
    assert running.is_alive()


@pytest.mark.slow
def test_up_with_a_real_server(tmp_path: Path, free_port: int):
    """Pools and deployments once; the worker anew when HF_TOKEN comes, and not otherwise; no secret on disk."""
    given = {**os.environ, "TATARA_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": str(free_port)}
    prefect = subject.find_prefect(given)
    try:
        subject.start_server(prefect)
        subject.call(prefect, "/work_pools/", {"name": "gpu", "type": "process"})  # somebody's own
        assert subject.deploy(prefect) is True
        assert subject.deploy(prefect) is False
        limits = {name: subject.call(prefect, f"/work_pools/{name}")["concurrency_limit"] for name in subject.POOLS}
        assert limits == {"local": 4, "gpu": None}  # what was there is left as it was
        name = lose_a_run(prefect)
        assert settle_lost_runs(prefect, "local") == [name]
        assert settle_lost_runs(prefect, "local") == []
        assert subject.start_worker(prefect) == "started"
        lose_a_run(prefect)
        assert settle_lost_runs(prefect, "local") == []  # a worker is there: it may be its run
        of_a_shell = {"SHLVL": "9", "PYTHONDONTWRITEBYTECODE": "1"}
        assert subject.start_worker(subject.find_prefect({**given, **of_a_shell})) == "runs"
        with_token = subject.find_prefect({**given, "HF_TOKEN": "hf_verysecret"})
        assert subject.start_worker(with_token) == "started anew, for HF_TOKEN changed"
        worker = processes.find_alive(prefect.identity("worker"))
        assert worker and procfs.read_variables(worker.pid)["HF_TOKEN"] == "hf_verysecret"
        assert "hf_verysecret" not in (prefect.home / "worker.json").read_text()
        assert subject.stop(prefect) == ["prefect worker", "prefect server"]
    finally:
        subject.stop(prefect)


def lose_a_run(prefect: subject.Prefect) -> str:
    """A run of finetune/tiny that is Running at the server, and nowhere else."""
    deployment = subject.call(prefect, "/deployments/name/finetune/tiny")
    body = {"idempotency_key": uuid4().hex}
    for last in (False, False, True):  # a busy server may not answer for a minute; the key makes it one run
        try:
            run = subject.call(prefect, f"/deployments/{deployment['id']}/create_flow_run", body)
            break
        except TimeoutError:
            if last:
                raise
    state = {"type": "RUNNING", "name": "Running"}
    subject.call(prefect, f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return run["name"]


def test_stop_ends_worker_before_server_and_only_ours(tmp_path: Path):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path)})
    assert subject.stop(prefect) == []
    running = [
        processes.start_detached(
            processes.Program(
                argv=(sys.executable, "-c", "import time; time.sleep(60)"),
                variables={"PATH": os.environ["PATH"]},
                identity_file=prefect.identity(name),
                log=tmp_path / "log",
                digest="",
            )
        )
        for name in ("server", "worker")
    ]
    assert subject.stop(prefect) == ["prefect worker", "prefect server"]
    assert not any(identity.is_alive() for identity in running)
    assert subject.stop(prefect) == []


def test_failing_prefect_command_is_told_with_what_it_said(tmp_path: Path):
    prefect = subject.find_prefect({**os.environ, "TATARA_HOME": str(tmp_path)})
    with pytest.raises(ServiceError, match=r"`prefect no-such-command` ended with [12]:\n(.|\n)*no-such-command"):
        subject._run(prefect, "no-such-command")
