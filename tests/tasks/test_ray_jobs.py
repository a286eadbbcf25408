"""The client of Ray's Jobs API against a stand-in on loopback that fails as networks do; real Ray is in tests/ppo."""

import pytest

from tasks import ray_follow
from tasks.errors import RightsError, ServiceError, TokenError, TransientError, UnavailableError
from tasks.ray_follow import Patience, follow
from tasks.ray_jobs import Job, RayJobs

QUICK = Patience(poll_s=0.02, health_s=0.05, lost_after_s=5.0)


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
            ray.faults = ["cut", 503, 500, "cut"]  # 500: an agent that comes and goes
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


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED"])
def test_a_log_that_ray_can_not_read_is_said_once_and_the_job_is_followed_by_its_state(ray, jobs, caplog, status):
    jobs.ensure(JOB)
    told, looks = [], []
    ray.jobs["j-1"]["logs"] = "one\n"

    def tell(line):
        told.append(line)
        ray.jobs["j-1"]["logs"] = b"one\nbad \xff byte\n"

    def look(nodes):
        looks.append(nodes)
        if len(looks) == 10:
            ray.jobs["j-1"]["status"] = status

    brief = Patience(poll_s=0.02, health_s=0.01, lost_after_s=0.3)
    state = follow(jobs, "j-1", brief, tell, look)
    assert state.status == status and told == ["one"]
    assert caplog.text.count("the log of job j-1 can't be read") == 1 and "does not answer" not in caplog.text


def test_a_log_that_comes_back_is_told_from_where_it_was(ray, jobs):
    jobs.ensure(JOB)
    told, looks = [], []
    ray.jobs["j-1"]["logs"] = b"one\n\xff"

    def look(nodes):
        looks.append(nodes)
        if len(looks) == 5:
            ray.jobs["j-1"] |= {"logs": "one\ntwo\n", "status": "SUCCEEDED"}

    follow(jobs, "j-1", Patience(poll_s=0.02, health_s=0.01), told.append, look)
    assert told == ["one", "two"]


def test_nodes_that_can_not_be_counted_are_no_lost_cluster(ray, jobs, caplog):
    jobs.ensure(JOB)
    ray.jobs["j-1"] |= {"status": "SUCCEEDED", "logs": "one\n"}
    ray.faults, told = [None, 500], []
    assert follow(jobs, "j-1", QUICK, told.append, print).is_done
    assert told == ["one"] and "does not answer" not in caplog.text


def test_each_line_of_a_log_whose_beginning_is_told_no_more_is_told_once(ray, jobs):
    """Newer Rays tell the last 16 MiB."""
    jobs.ensure(JOB)
    ray.log_chars, told = 1500, []

    def print_more(nodes=()):
        count = len(ray.jobs["j-1"]["logs"].splitlines())
        ray.jobs["j-1"]["logs"] += "".join(f"step:{count + i} - x\n" for i in range(15))
        if count > 190:
            ray.jobs["j-1"]["status"] = "SUCCEEDED"

    quick = Patience(poll_s=0.005, health_s=0.0)
    follow(jobs, "j-1", quick, told.append, print_more)
    assert told == [f"step:{number} - x" for number in range(len(told))] and len(told) > 190
    ray.jobs["j-1"]["logs"] += "step:after - x\n"
    again = []
    follow(jobs, "j-1", quick, again.append, print, lambda: told)  # one that was started anew, with what is on its disk
    assert again == [*told, "step:after - x"]
    again.clear()
    follow(jobs, "j-1", quick, again.append, print)
    assert again[0].startswith("[LOG TRUNCATED") and again[-1] == "step:after - x" and len(again) < 150


@pytest.mark.parametrize("faults", [[503], [None, 503], [None, 500], [None, "cut"], [None, None, 503]])
def test_a_cancel_that_meets_a_busy_dashboard_stops_the_job(ray, jobs, faults):
    jobs.ensure(JOB)
    ray.faults = faults
    assert ray_follow.try_to_stop(jobs, "j-1", 5.0)
    assert ray.jobs["j-1"]["status"] == "STOPPED" and not ray.faults


def test_a_cancel_that_nobody_answers_says_what_to_do(ray, jobs, caplog, monkeypatch):
    jobs.ensure(JOB)
    monkeypatch.setattr(ray_follow, "CANCEL", Patience(poll_s=0.01, lost_after_s=0.1))
    ray.faults = ["cut"] * 100
    assert not ray_follow.try_to_stop(jobs, "j-1", 5.0)
    assert f"Ray job j-1 may still run: `ray job stop --address {ray.url} j-1`" in caplog.text
