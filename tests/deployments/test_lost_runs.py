"""What a worker that was killed left of a promotion is taken back by the next `tatara up`."""

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.lost_runs import settle_lost_runs
from deployments.orchestration import Prefect
from tasks.serve import promotion, services, trial
from tasks.serve.services import ServiceSettings
from tests.ports import free_port
from tests.tasks.serve.conftest import old  # noqa: F401  (a fixture)
from tests.tasks.serve.stand_in import ask, make_model, running


class Server(http.server.ThreadingHTTPServer):
    """Prefect's API as far as it is asked here."""

    told: list[str]
    runs: list[dict[str, object]]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.told.append(self.path)
        body = json.dumps(self.server.runs if self.path.endswith("/filter") else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def api() -> Iterator[Server]:
    with Server(("127.0.0.1", free_port()), _Handler) as server:
        server.told, server.runs = [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _prefect(api: Server, settings: ServiceSettings) -> Prefect:
    url = f"http://127.0.0.1:{api.server_port}/api"
    return Prefect(api_url=url, home=settings.home / "prefect", is_ours=True, variables={})


def _newer(old: ServiceSettings) -> ServiceSettings:  # noqa: F811
    folder = make_model(Path(old.model).with_name("new"), "new")
    return replace(old, model=str(folder), ids={"TATARA_MODEL_DIGEST": "digest-new", "TATARA_RUN_ID": "r2"})


def test_a_lost_promotion_leaves_no_candidate(old: ServiceSettings, api: Server):  # noqa: F811
    promotion.start_candidate(_newer(old))
    api.runs = [{"id": "r2", "name": "finetune-tiny"}]
    assert settle_lost_runs(_prefect(api, old), "local") == ["finetune-tiny"]
    assert running(old) == {"vllm", "vllm-b", "gateway"}
    api.runs = [{"id": "r2", "name": "promote-latest", "parameters": {"storage": ""}}]
    assert settle_lost_runs(_prefect(api, old), "local") == ["promote-latest"]
    assert api.told[-1] == "/api/flow_runs/r2/set_state"
    assert running(old) == {"vllm", "gateway"} and ask(old)[1] == "old"


def test_a_lost_promotion_leaves_no_model_on_trial(
    old: ServiceSettings,  # noqa: F811
    api: Server,
):
    new = _newer(old)
    trial.begin(new)
    services.start(new)
    assert ask(old)[1] == "new"
    api.runs = [{"id": "r2", "name": "promote-latest"}]
    settle_lost_runs(_prefect(api, old), "local")
    assert ask(old)[1] == "old" and running(old) == {"vllm", "gateway"}
