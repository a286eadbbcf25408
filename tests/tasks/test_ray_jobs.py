"""The client of Ray's Jobs API against a stand-in on loopback that fails as networks do; real Ray is in tests/ppo."""

import pytest

from tasks.errors import RightsError, ServiceError, TokenError, TransientError, UnavailableError
from tasks.ray_jobs import Job, Patience, RayJobs, follow

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
