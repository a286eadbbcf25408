"""Weave's own server killed with SIGKILL while it stores, and started again on the same database."""

import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tasks.errors import TransientError
from tasks.traces.run import drain_traces, sink_from_environment
from tasks.traces.spec import DrainSpec
from tests.ports import free_port
from tests.weave.conftest import PYTHON, TraceServer, wait_until_it_answers

pytestmark = [pytest.mark.weave, pytest.mark.timeout(400)]
SPEC = DrainSpec(batch_records=10, grace_s=0.3, request_timeout_s=20)
DEATHS = ("at any moment", "at any moment", "stored, not answered")


class Mortal:
    """A trace server of our own, on one port and one database through all its deaths."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.weave = TraceServer(f"http://127.0.0.1:{self.port}", "mortal")

    def start(self):
        script, log = Path(__file__).parent / "trace_server.py", self.folder / "log"
        argv = [str(PYTHON), str(script), str(self.port), str(self.folder / "chdb")]
        with log.open("ab") as output:
            self.process = subprocess.Popen(argv, stdout=output, stderr=output)
        wait_until_it_answers(f"{self.weave.url}/health", self.process, log)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def mortal(tmp_path):
    server = Mortal(tmp_path)
    server.start()
    yield server
    server.kill()
    server.weave.client.close()


def test_a_server_killed_while_it_stores_neither_loses_nor_doubles(queue, mortal, make_record):
    records = [make_record(n) for n in range(400)]
    queue.append(record.to_line() for record in records)
    dice = random.Random(4)
    for death in DEATHS:
        stored = death == "stored, not answered"
        mortal.weave.plan(delay_s=0.08, next=["ok"] * 4 + ["hang-stored"] * stored)
        threading.Timer(3.0 if stored else dice.uniform(0.6, 1.2), mortal.kill).start()
        with pytest.raises(TransientError):
            drain_traces(queue, sink_from_environment(SPEC, mortal.weave.environment()), SPEC)
        mortal.process.wait()
        mortal.start()
    report = drain_traces(queue, sink_from_environment(SPEC, mortal.weave.environment()), SPEC)
    assert (report.num_dead, report.num_waiting) == (0, 0)
    assert report.num_already_there == SPEC.batch_records  # what it had stored when it died
    assert report.num_delivered < len(records) - SPEC.batch_records
    assert mortal.weave.rows() == {record.trace_id: 1 for record in records}
    assert mortal.weave.count() == len(records)
