"""Jobs on a real Ray cluster of two nodes: submitted once, followed over cuts and kills, stopped; failures are told."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tasks import files
from tasks.errors import CapacityError, RightsError, SpecError, TokenError, TrainingError
from tasks.ppo.attempts import choose_attempt, follow_where, is_there
from tasks.ppo.cluster import ask_nodes, open_cluster, require_fit
from tasks.ppo.run import run_job
from tasks.procfs import list_pids
from tasks.ray_errors import MEANINGS
from tasks.ray_follow import Health, Patience, follow
from tasks.ray_jobs import Job, RayJobs
from tasks.specs import BaseModelSpec, PpoRecipe, PpoSpec, RaySpec
from tests.ppo.conftest import ROOT, TWO_NODES
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
ONE = PpoSpec(nnodes=2, n_gpus_per_node=1, train_batch_size=4, ppo_mini_batch_size=2)
COUNT = "import time\nfor i in range({}):\n  print('line', i, flush=True)\n  time.sleep(0.2)"
RECIPE = PpoRecipe(base=BaseModelSpec(model="x"), ray=RaySpec(poll_s=0.2, health_s=1, lost_after_s=60))


def _command(cluster, code):
    return shlex.join([cluster.python, "-c", code])


def _follower(cluster, key, command, folder, log):
    argv = [sys.executable, str(Path(__file__).with_name("follower.py")), cluster.jobs.url, key, command, str(folder)]
    return subprocess.Popen(
        argv,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": cluster.token},
    )


def _submissions(cluster, key):
    rows = httpx.get(
        f"{cluster.jobs.url}/api/jobs/", timeout=30, headers={"Authorization": f"Bearer {cluster.token}"}
    ).json()
    return sorted(
        row["submission_id"] for row in rows if (row["submission_id"] or "").startswith(f"tatara-ppo-{key[:16]}")
    )


def test_two_nodes_tell_what_they_have(cluster, tmp_path, caplog):
    nodes = cluster.jobs.nodes()
    assert [node.is_head for node in nodes] == [True, False]
    assert all((node.count("CPU"), node.count("GPU")) == (8, 1) for node in nodes)
    with caplog.at_level("INFO"):
        versions = require_fit(cluster, TWO_NODES, ONE, [str(tmp_path)])
    assert (versions["verl"], versions["ray"]) == ("0.9.1", "2.60.0")
    assert "2 nodes" in caplog.text and "verl 0.9.1; all see the files" in caplog.text
    assert cluster.jobs.version() == "2.60.0"


def test_the_errors_that_a_driver_explains_are_rays(cluster):
    code = "import sys, ray.exceptions as e\nfor n in sys.argv[1:]: assert issubclass(getattr(e, n), e.RayError), n"
    subprocess.run([cluster.python, "-c", code, *MEANINGS], check=True)


def test_nobody_runs_code_on_it_without_its_token(cluster):
    for variables, error in (({}, TokenError), ({"RAY_AUTH_TOKEN": "0" * 64}, RightsError)):
        stranger = RayJobs(cluster.jobs.url, variables)
        with pytest.raises(error):
            stranger.ensure(Job(submission_id="stranger", entrypoint="true"))
        stranger.close()
    assert cluster.jobs.find("stranger") is None


def test_a_cluster_that_is_too_small_or_lacks_something_is_refused_before_anything_is_submitted(cluster, tmp_path):
    with pytest.raises(
        CapacityError, match=r"needs 2 nodes with 8 GPU each, but the cluster .* has 2 nodes: one with 1 GPU"
    ):
        require_fit(cluster, TWO_NODES, PpoSpec(), [])
    gone = str(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=f"does not see {gone}: put TATARA_HOME on shared storage"):
        require_fit(cluster, TWO_NODES, ONE, [gone])
    with pytest.raises(SpecError, match="has no WANDB_API_KEY set: set it there before `ray start`"):
        require_fit(cluster, TWO_NODES, ONE.model_copy(update={"report_to": "wandb"}), [])
    facts = ask_nodes(cluster, [], [])
    assert len(facts) == 2 and not any(fact.error for fact in facts)


def test_a_job_is_followed_over_a_cut_connection(cluster, proxy, caplog):
    jobs, lines = RayJobs(proxy.url, {"RAY_AUTH_TOKEN": cluster.token}), []
    job = Job(submission_id=f"cut-{uuid4().hex[:8]}", entrypoint=_command(cluster, COUNT.format(40)))
    jobs.ensure(job)

    def tell(line):
        lines.append(line)
        if line == "line 5":
            proxy.cut()
            import threading

            threading.Timer(3.0, proxy.mend).start()

    with caplog.at_level("INFO"):
        state = follow(
            jobs, job.submission_id, Patience(poll_s=0.2, health_s=1, lost_after_s=60), tell, lambda nodes: None
        )
    assert state.status == "SUCCEEDED"
    assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(40)]
    assert "does not answer" in caplog.text and "answers again" in caplog.text


def test_a_follower_that_was_killed_finds_its_job_again(cluster, tmp_path):
    key, log = uuid4().hex, tmp_path / "out"
    command = _command(cluster, COUNT.format(60))
    first = _follower(cluster, key, command, tmp_path, log)
    told = tmp_path / "job-1.log"
    wait_for(lambda: told.exists() and "line 5" in told.read_text(), 60)
    first.kill()
    first.wait()
    second = _follower(cluster, key, command, tmp_path, log)
    assert second.wait(90) == 0, log.read_text()
    assert _submissions(cluster, key) == [f"tatara-ppo-{key[:16]}-1"]
    kept = [line for line in told.read_text().splitlines() if line.startswith("line")]
    assert kept == [f"line {i}" for i in range(60)]
    assert "is there (RUNNING): following it" in log.read_text() and "THROUGH" in log.read_text()
    assert log.read_text().count("line 3\n") == 1  # a line is logged once over both


def test_a_cancel_stops_the_job(cluster, tmp_path):
    key, log, mark = uuid4().hex, tmp_path / "out", f"mark{uuid4().hex}"
    follower = _follower(cluster, key, _command(cluster, f"# {mark}\n" + COUNT.format(3000)), tmp_path, log)
    wait_for(lambda: "line 3" in log.read_text() if log.exists() else False, 60)
    follower.send_signal(signal.SIGTERM)
    assert follower.wait(60) == 143
    state = cluster.jobs.find(f"tatara-ppo-{key[:16]}-1")
    assert state and state.status == "STOPPED", log.read_text()
    wait_for(lambda: not _runs_with(mark), 20)


def _runs_with(mark):
    found = []
    for pid in list_pids():
        try:
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and pid != os.getpid():
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_job_that_fails_shows_its_last_lines_and_the_next_run_is_another_attempt(cluster, tmp_path):
    key = uuid4().hex
    bad = _command(cluster, "print('about to fail', flush=True)\nraise ValueError('no such thing as this')")
    with pytest.raises(TrainingError, match=r"failed \(exit code 1\)(.|\n)*about to fail(.|\n)*no such thing as this"):
        run_job(cluster, key, bad, RECIPE, tmp_path, lambda line, attempt: None)
    good, told = _command(cluster, "print('well')"), []
    run_job(cluster, key, good, RECIPE, tmp_path, lambda line, attempt: told.append((attempt, line)))
    assert (2, "well") in told
    assert _submissions(cluster, key) == [f"tatara-ppo-{key[:16]}-{number}" for number in (1, 2)]
    run_job(cluster, key, good, RECIPE, tmp_path, lambda line, attempt: None)  # it succeeded: found, not run again
    assert len(_submissions(cluster, key)) == 2


def test_a_node_that_is_lost_is_said_at_once(tmp_path, caplog):
    """A cluster of its own: one raylet of it is killed."""
    with open_cluster(TWO_NODES, PpoSpec(), tmp_path, dict(os.environ)) as mine:
        require_fit(mine, TWO_NODES, ONE, [])
        temp_folder = files.read_json(tmp_path / "cluster.json")["temp_folder"]
        assert Path(temp_folder).is_dir()
        health = Health("so")
        health(mine.jobs.nodes())
        assert len(mine.jobs.nodes()) == 2 and not health.lost
        os.kill(_second_raylet(tmp_path), signal.SIGKILL)
        begin = time.monotonic()
        wait_for(lambda: len(mine.jobs.nodes()) == 1, 60)
        health(mine.jobs.nodes())
        assert len(health.lost) == 1 and "is lost, 1 are left" in caplog.text
        assert time.monotonic() - begin < 60
    wait_for(lambda: not _cluster_pids(tmp_path), 20)
    assert not Path(temp_folder).exists()  # Ray's sockets and logs


def test_a_worker_that_names_another_cluster_follows_the_job_where_it_is(cluster, tmp_path):
    """The job was submitted by a run that is gone; this one names a cluster that nobody answers at."""
    key, variables = uuid4().hex, {"RAY_AUTH_TOKEN": cluster.token}
    attempt = choose_attempt(replace(cluster, is_ours=False), key, tmp_path)
    cluster.jobs.ensure(Job(submission_id=attempt.submission_id, entrypoint=_command(cluster, COUNT.format(30))))
    elsewhere = RaySpec(address="http://127.0.0.1:9", poll_s=0.2, health_s=1, lost_after_s=60)
    found = follow_where(tmp_path, elsewhere, variables)
    assert (found.address, found.python) == (cluster.jobs.url, cluster.python)
    with open_cluster(found, ONE, tmp_path, variables) as there:
        assert is_there(there.jobs, tmp_path)
        told = []
        recipe = RECIPE.model_copy(update={"ray": found})
        run_job(there, key, "never submitted", recipe, tmp_path, lambda line, number: told.append((number, line)))
    assert [line for line in told if line[1].startswith("line")] == [(1, f"line {i}") for i in range(30)]
    assert _submissions(cluster, key) == [attempt.submission_id]


def _cluster_pids(folder):
    wanted = f"TATARA_PROCESS={folder.resolve() / 'process.json'}".encode()
    found = []
    for pid in list_pids():
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def _second_raylet(folder):
    raylets = [pid for pid in _cluster_pids(folder) if b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return max(raylets, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]))
