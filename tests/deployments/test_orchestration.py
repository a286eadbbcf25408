"""Which Prefect is meant, what is said when it can't start, and what is left alone."""

import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments import orchestration as subject
from tasks import files, processes
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


class _Counting(_Other):
    """A Prefect server, which is not ours, that knows all six deployments."""

    def do_POST(self) -> None:
        known = self.path == "/api/deployments/count"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"6")


def test_deployments_are_made_once_for_the_same_sources(tmp_path: Path, free_port: int):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": str(free_port)})
    elsewhere = subject.find_prefect({"TATARA_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": "4999"})
    wanted = subject._deployed_digest(prefect)
    assert wanted == subject._deployed_digest(prefect) != subject._deployed_digest(elsewhere)
    files.write_json(prefect.home / "deployed.json", wanted)
    server = ThreadingHTTPServer(("127.0.0.1", free_port), _Counting)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        assert subject.deploy(prefect) is False  # Prefect's command line is not called: it would fail here
    finally:
        server.shutdown()
        server.server_close()


def test_stop_ends_worker_before_server_and_only_ours(tmp_path: Path):
    prefect = subject.find_prefect({"TATARA_HOME": str(tmp_path)})
    assert subject.stop(prefect) == []
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    env = {"PATH": os.environ["PATH"]}
    running = [
        processes.start_detached(sleep, env, tmp_path / "log", prefect.identity(name)) for name in ("server", "worker")
    ]
    assert subject.stop(prefect) == ["prefect worker", "prefect server"]
    assert not any(identity.is_alive() for identity in running)
    assert subject.stop(prefect) == []


def test_failing_prefect_command_is_told_with_what_it_said(tmp_path: Path):
    prefect = subject.find_prefect({**os.environ, "TATARA_HOME": str(tmp_path)})
    with pytest.raises(ServiceError, match=r"`prefect no-such-command` ended with [12]:\n(.|\n)*no-such-command"):
        subject._run(prefect, "no-such-command")
