"""The client of Ray's Jobs API against a stand-in on loopback that fails as networks do; real Ray is in tests/ppo."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasks.errors import RightsError, ServiceError, TokenError, TransientError, UnavailableError
from tasks.ray_jobs import Job, Patience, RayJobs, follow
from tests.ports import free_port

QUICK = Patience(poll_s=0.02, health_s=0.05, lost_after_s=5.0)


class Dashboard:
    """Ray's Jobs API as far as the client uses it. `faults` are taken one after the other, each by one request."""

    def __init__(self, port):
        self.jobs, self.submissions, self.faults, self.asked, self.alive = {}, [], [], [], 2
        self.token = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def say(self, status, value):
                body = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path, self.headers.get("Authorization")))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "cut":  # before anything is done
                    self.close_connection = True
                    self.connection.close()
                    return
                if isinstance(fault, int):
                    self.say(fault, "busy")
                    return
                if outer.token and self.headers.get("Authorization") != f"Bearer {outer.token}":
                    self.say(401 if not self.headers.get("Authorization") else 403, "no")
                    return
                status, value = outer.answer(self.command, self.path, body)
                if fault == "lost":  # done, but nobody hears of it
                    self.close_connection = True
                    self.connection.close()
                    return
                self.say(status, value)

            do_GET = do_POST = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, method, path, body):
        name = path.split("/")[3] if path.count("/") > 2 else ""
        if path == "/api/version":
            return 200, {"ray_version": "2.60.0"}
        if path.startswith("/api/v0/nodes"):
            rows = [
                {
                    "node_id": f"n{i}",
                    "node_ip": f"10.0.0.{i}",
                    "is_head_node": i == 1,
                    "state": state,
                    "resources_total": {"CPU": 2.0},
                }
                for i, state in enumerate(["ALIVE"] * self.alive + ["DEAD"])
            ]
            return 200, {"data": {"result": {"result": rows}}}
        if method == "POST" and path == "/api/jobs/":
            wanted = json.loads(body)
            if wanted["submission_id"] in self.jobs:
                return (
                    500,
                    f"Traceback ...\nValueError: Job with submission_id {wanted['submission_id']} already exists.",
                )
            if "bad" in wanted["entrypoint"]:
                return 500, "Traceback (most recent call last):\n  File x\nValueError: no such runtime_env"
            self.submissions.append(wanted)
            self.jobs[wanted["submission_id"]] = {
                "status": "RUNNING",
                "message": "",
                "driver_exit_code": None,
                "logs": "",
            }
            return 200, {"submission_id": wanted["submission_id"]}
        if name not in self.jobs:
            return 404, "Job does not exist"
        if path.endswith("/logs"):
            return 200, {"logs": self.jobs[name]["logs"]}
        if path.endswith("/stop"):
            self.jobs[name]["status"] = "STOPPED"
            return 200, {"stopped": True}
        if method == "DELETE":
            del self.jobs[name]
            return 200, {"deleted": True}
        return 200, self.jobs[name]


@pytest.fixture
def ray():
    made = Dashboard(free_port())
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def jobs(ray):
    made = RayJobs(ray.url, {})
    yield made
    made.close()


JOB = Job(submission_id="j-1", entrypoint="python -m x", env_vars={"NCCL_DEBUG": "WARN"})


def test_a_job_is_submitted_once(ray, jobs):
    assert jobs.ensure(JOB).status == "RUNNING" and jobs.ensure(JOB).status == "RUNNING"
    assert [sent["runtime_env"] for sent in ray.submissions] == [{"env_vars": {"NCCL_DEBUG": "WARN"}}]
    assert jobs.version() == "2.60.0"


@pytest.mark.parametrize("fault", ["cut", "lost", 503])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_lost_answer_never_submits_twice(ray, jobs, fault, at):
    ray.faults = [None] * at + [fault]
    with pytest.raises(UnavailableError):
        jobs.ensure(JOB)
    assert jobs.ensure(JOB).status == "RUNNING"
    assert len(ray.submissions) == 1


def test_a_second_submitter_that_was_quicker_is_no_error(ray, jobs):
    ray.jobs["j-1"] = {"status": "RUNNING", "message": "", "driver_exit_code": None, "logs": ""}
    ray.faults = [404]  # the look before: not there yet
    assert jobs.ensure(JOB).status == "RUNNING" and not ray.submissions


def test_what_ray_refuses_is_said_with_its_last_line(ray, jobs):
    with pytest.raises(ServiceError, match="500 ValueError: no such runtime_env"):
        jobs.ensure(Job(submission_id="j-2", entrypoint="bad"))


def test_lines_are_told_once_over_lost_connections(ray, jobs, caplog):
    jobs.ensure(JOB)
    told, looks = [], []
    ray.jobs["j-1"]["logs"] = "one\ntwo\nthr"

    def tell(line):
        told.append(line)
        if line == "two":
            ray.faults = ["cut", 503, 502, "cut"]
            ray.jobs["j-1"]["logs"] = "one\ntwo\nthree\nfour\nfive"
        if line == "four":
            ray.jobs["j-1"] |= {"status": "SUCCEEDED", "driver_exit_code": 0}

    with caplog.at_level("INFO"):
        state = follow(jobs, "j-1", QUICK, tell, lambda nodes: looks.append(len(nodes)))
    assert told == ["one", "two", "three", "four", "five"]
    assert state.is_done and state.exit_code == 0 and set(looks) == {2}
    assert caplog.text.count("does not answer") == 1 and "answers again" in caplog.text


def test_a_dashboard_that_stays_away_is_given_up_and_the_job_left(ray, jobs):
    jobs.ensure(JOB)
    ray.faults = ["cut"] * 1000
    with pytest.raises(TransientError, match="j-1 was left alone: the next run follows it"):
        follow(jobs, "j-1", Patience(poll_s=0.01, health_s=9, lost_after_s=0.2), print, lambda nodes: None)
    assert ray.jobs["j-1"]["status"] == "RUNNING"


def test_a_cluster_that_was_started_anew_knows_no_job(ray, jobs):
    jobs.ensure(JOB)
    ray.jobs.clear()
    with pytest.raises(TransientError, match="knows no job j-1 any more"):
        follow(jobs, "j-1", QUICK, print, lambda nodes: None)


def test_the_token_is_sent_and_never_shown(ray, tmp_path, caplog):
    ray.token = "s3cret"
    (tmp_path / "token").write_text("s3cret\n")
    for variables in ({"RAY_AUTH_TOKEN": "s3cret"}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        client = RayJobs(ray.url, variables)
        assert len(client.nodes()) == 2 and client.nodes()[0].is_head
        client.close()
    with caplog.at_level("DEBUG"):
        for variables, error in (({}, TokenError), ({"RAY_AUTH_TOKEN": "wr0ng"}, RightsError)):
            client = RayJobs(ray.url, variables)
            with pytest.raises(error) as caught:
                client.nodes()
            assert "wr0ng" not in str(caught.value)
            client.close()
    assert "s3cret" not in caplog.text and "wr0ng" not in caplog.text


def test_something_else_on_that_port_is_said(ray, jobs):
    ray.answer = lambda *args: (200, {"hello": 1})
    with pytest.raises(ServiceError, match="is no dashboard of Ray"):
        jobs.version()
