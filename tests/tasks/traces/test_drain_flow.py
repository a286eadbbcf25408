"""The flow ingest-traces in a real, ephemeral Prefect: blocks in, artifact out."""

import os
import subprocess
import sys

import pytest
from pydantic import SecretStr

from blocks.trace_queue import TraceQueue
from blocks.weave_project import WeaveProject
from tasks.traces.queue import FileQueue

pytestmark = pytest.mark.long

RUN = """
import sys
from prefect.testing.utilities import prefect_test_harness
from prefect.client.orchestration import get_client
from pydantic import SecretStr
place, url, redis_port = sys.argv[1:]
with prefect_test_harness(server_startup_timeout=60):
    from blocks.trace_queue import TraceQueue
    from blocks.weave_project import WeaveProject
    from flows.drain import drain
    from tasks.traces.spec import DrainSpec
    TraceQueue(file_path=place).save("here")
    WeaveProject(entity="team", api_key=SecretStr("key"), trace_server_url=url).save("there")
    report = drain(DrainSpec(grace_s=0.0), "here", "there")
    def artifact():
        with get_client(sync_client=True) as client:
            return client.request("POST", "/artifacts/latest/filter", json={}).json()[0]
    print("REPORT", report.sink, report.num_delivered)
    print("ARTIFACT", artifact()["key"], artifact()["data"])
    from pathlib import Path
    from tasks.traces.queue import FileQueue
    queue = FileQueue(Path(place))
    queue.append([Path(place).with_suffix(".more").read_bytes()])
    queue.close()
    import urllib.request
    urllib.request.urlopen(urllib.request.Request(url + "/misbehave", b'{"next": ["401"]}')).close()
    try:
        drain(DrainSpec(grace_s=0.0), "here", "there")
    except Exception as error:
        print("FAILED", type(error).__name__)
    print("ARTIFACT2", artifact()["key"], artifact()["data"])
"""


@pytest.mark.timeout(180)
def test_the_flow_drains_with_blocks_and_leaves_an_artifact(weave, make_record, tmp_path, root):
    queue = FileQueue(tmp_path / "q.jsonl")
    queue.append(make_record(n).to_line() for n in range(3))
    queue.close()
    (tmp_path / "q.more").write_bytes(make_record(3).to_line())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "WANDB_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]]),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "DO_NOT_TRACK": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(queue.path), weave.url, "0"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert "REPORT weave 3" in result.stdout, result.stdout + result.stderr
    assert "ARTIFACT trace-ingestion" in result.stdout
    assert "| delivered | 3 |" in result.stdout
    assert len(weave.rows()) == 3
    assert "FAILED AccessError" in result.stdout
    failed = result.stdout.partition("ARTIFACT2 trace-ingestion")[2]
    assert "| status | failed |" in failed
    assert "| still waiting | 1 |" in failed
    assert "WANDB_API_KEY is wrong" in failed
    assert "Correct the key" in failed


def test_importing_the_flow_loads_no_torch_and_no_sink(root):
    code = (
        "import sys, flows.drain;"
        "print(sorted({'torch', 'transformers', 'wandb', 'weave', 'redis', 'vllm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_blocks_build_clients_and_hide_their_secrets():
    queue = TraceQueue(redis_url=SecretStr("redis://:hunter2@host:6390/1"))
    assert queue.client().connection_pool.connection_kwargs["password"] == "hunter2"
    assert TraceQueue().client() is None
    project = WeaveProject(entity="team", api_key=SecretStr("hunter2"), trace_server_url="http://here")
    assert project.project_id == "team/tatara"
    request = project.client().build_request("POST", "/calls/stream_query")
    assert str(request.url) == "http://here/calls/stream_query"
    assert "hunter2" not in repr(queue) + repr(project)
