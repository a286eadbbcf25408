"""A job is found again where it was submitted, whatever a later run names; real Ray is in tests/ppo."""

import asyncio
import json
import shlex
import shutil
import time
from pathlib import Path

import pytest

from flows.recipes import resolve_ppo
from tasks import files
from tasks.artifacts import ArtifactStore, ReinforcedModel
from tasks.check.ppo import check_ppo
from tasks.errors import CapacityError, MissingError, UnavailableError
from tasks.ppo import run
from tasks.ppo.attempts import follow_where, read_attempt
from tasks.ppo.cluster import Cluster as Opened
from tasks.ppo.cluster import stop_locally
from tasks.ppo.preflight import find_begun
from tasks.ppo.probe_text import MARK
from tasks.processes import Program, start_detached
from tasks.ray_jobs import RayJobs
from tests.ports import free_port
from tests.ray_dashboard import Dashboard
from tests.reinforced import NOBODY, make_inputs, make_reinforced, save_moved

STEP = "step:1 - critic/score/mean:0.5\n"
FACTS = {
    "address": "10.0.0.1",
    "resources": {"CPU": 2.0, "GPU": 1.0},
    "python": "3.11.2",
    "ray": "2.60.0",
    "verl": "0.9.1",
    "unseen": [],
    "lacking": [],
}


class Cluster(Dashboard):
    """A dashboard whose jobs succeed at once: the trainer leaves a checkpoint, verl's merger a model."""

    def __init__(self, base: Path):
        self.base, self.is_quick = base, True
        super().__init__(free_port())

    def answer(self, method, path, body):
        said = super().answer(method, path, body)
        if method == "POST" and path == "/api/jobs/" and self.is_quick:
            job = self.submissions[-1]
            words = shlex.split(job["entrypoint"])
            if "verl.model_merger" in words:
                save_moved(self.base, Path(words[words.index("--target_dir") + 1]), 1)
            told = f"{MARK}{json.dumps([FACTS])}\n" if job["submission_id"].startswith("tatara-probe") else STEP
            self.jobs[job["submission_id"]] |= {"status": "SUCCEEDED", "logs": told}
        return said

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def line(tmp_path):
    """A store, a recipe with its inputs, and the folder that its model will be in; a job of it is written down."""
    store = ArtifactStore(tmp_path / "home")
    changes = {"ray": {"address": "", "python": "python", "poll_s": 0.05, "lost_after_s": 0.4}}
    recipe, questions, base = make_inputs(store, tmp_path / "base", resolve_ppo("tiny_ppo", changes))
    folder = store.folder(ReinforcedModel, run.model_key(questions, base, recipe.ppo))
    actor = folder / "checkpoints" / "global_step_1" / "actor"
    actor.mkdir(parents=True)
    files.write_text(folder / "checkpoints" / "latest_checkpointed_iteration.txt", "1")
    return store, recipe, questions, base, folder


@pytest.fixture
def clusters(line):
    made = [Cluster(Path(line[3].model_folder)) for _ in range(2)]
    yield made
    for one in made:
        one.close()


def leave_job(folder, cluster, status="RUNNING"):
    """What a worker that was killed leaves: its job on a cluster, and the note of it."""
    name = "tatara-ppo-x-1"
    files.write_json(folder / "attempt.json", {"attempt": 1, "submission_id": name, "url": cluster.url, "python": "py"})
    said = {"status": status, "message": "", "driver_exit_code": None, "logs": "step:1 - critic/score/mean:0.25\n"}
    cluster.jobs[name] = said
    return name


def test_a_job_on_another_cluster_than_is_named_now_is_followed_to_its_model(line, clusters):
    store, recipe, questions, base, folder = line
    old, new = clusters
    leave_job(folder, old, "SUCCEEDED")
    for variables in ({"RAY_ADDRESS": new.url}, {}):
        assert follow_where(folder, recipe.ray, variables).address == old.url
    model = run.reinforce_model(questions, base, recipe, store, lambda record: None, {"RAY_ADDRESS": new.url})
    assert model.num_steps == 1 and not new.submissions
    [merge] = old.submissions  # neither a probe of the nodes nor a second trainer
    assert merge["entrypoint"].startswith("py -m verl.model_merger")


def test_a_running_job_is_followed_without_a_look_at_nodes_that_it_fills(line, clusters):
    """The cluster has no GPU left to show: a new run would be refused, the one that runs there is not."""
    store, recipe, questions, base, folder = line
    old, _ = clusters
    variables = {"RAY_ADDRESS": old.url}
    with pytest.raises(CapacityError, match="needs 1 node with 1 GPU"):
        run.reinforce_model(questions, base, recipe, store, lambda record: None, variables)
    leave_job(folder, old, "SUCCEEDED")
    assert run.reinforce_model(questions, base, recipe, store, lambda record: None, variables).num_steps == 1


def serve_here(folder, cluster):
    """Write the stand-in down as the cluster that was started here for this run; a process stands for Ray's."""
    sleep = ("sleep", "600")
    log = folder / "output.log"
    start_detached(Program(argv=sleep, variables={}, identity_file=folder / "process.json", log=log, digest=""))
    files.write_json(folder / "cluster.json", {"ports": {"dashboard": int(cluster.url.rpartition(":")[2])}})
    files.write_text(folder / "cluster.token", "t")


@pytest.mark.parametrize(
    ("where", "is_begun", "expected"), [("here", False, 1), ("here", True, 0), ("elsewhere", False, 0)]
)
def test_our_vllm_makes_room_for_a_job_that_begins_on_this_machine(line, clusters, where, is_begun, expected):
    store, recipe, questions, base, folder = line
    cluster, rooms = clusters[0], []
    cluster.gpus = 1
    address = "local" if where == "here" else cluster.url
    if where == "here":
        serve_here(folder, cluster)
    if is_begun:
        leave_job(folder, cluster, "SUCCEEDED")
        files.write_json(folder / "attempt.json", {**files.read_json(folder / "attempt.json"), "url": "local"})
    recipe = recipe.model_copy(update={"ray": recipe.ray.model_copy(update={"address": address, "local_nodes": 2})})

    def make_room():
        rooms.append([job["submission_id"][:12] for job in cluster.submissions])

    for _ in range(2):  # the second finds the model and needs nothing
        run.reinforce_model(questions, base, recipe, store, lambda record: None, {}, make_room)
    assert rooms == [["tatara-probe"]] * expected  # after the checks, before the trainer


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_a_job_that_ended_badly_keeps_nobody_from_the_cluster_that_is_named(line, clusters, status):
    _, recipe, _, _, folder = line
    old, new = clusters
    leave_job(folder, old, status)
    assert follow_where(folder, recipe.ray, {"RAY_ADDRESS": new.url}) == recipe.ray
    leave_job(folder, old)
    old.jobs.clear()  # that cluster was started anew
    assert follow_where(folder, recipe.ray, {"RAY_ADDRESS": new.url}) == recipe.ray


def test_a_cluster_that_is_away_is_asked_for_a_while_before_its_job_counts_as_lost(line, clusters, caplog):
    _, recipe, _, _, folder = line
    old, new = clusters
    leave_job(folder, old)
    old.faults = ["cut"] * 3
    patient = recipe.ray.model_copy(update={"lost_after_s": 60.0})
    assert follow_where(folder, patient, {"RAY_ADDRESS": new.url}).address == old.url
    begin = time.monotonic()
    old.faults = ["cut"] * 500
    assert follow_where(folder, recipe.ray, {"RAY_ADDRESS": new.url}) == recipe.ray
    assert time.monotonic() - begin > 0.4
    assert "two jobs would write the same checkpoints" in caplog.text and "counts as lost" in caplog.text
    old.faults = []


def test_what_has_begun_is_looked_for_before_a_cluster_is_asked_for(line, clusters, monkeypatch):
    store, recipe, questions, base, folder = line
    old, _ = clusters
    until_publish = recipe.model_copy(update={"until": "publish"})

    def cluster_line():
        return next(line for line in check_ppo(until_publish, store, NOBODY) if line.startswith("cluster"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(MissingError, match="no Ray cluster is named"):
        cluster_line()
    name = leave_job(folder, old)
    assert cluster_line() == f"cluster: job {name} is at {old.url} and is followed there"
    old.faults = ["cut"]
    with pytest.raises(UnavailableError):
        find_begun(recipe, questions, base, store, {"RAY_ADDRESS": old.url})
    old.faults = ["cut"]
    assert find_begun(recipe, questions, base, store, {"RAY_ADDRESS": "http://other:8265"}) == ""
    _, model = make_reinforced(store, Path(base.model_folder), recipe, num_steps=1)
    assert cluster_line() == f"cluster: not needed, reinforced/{model.short} is whole"


def test_a_note_of_an_older_version_or_a_torn_one_is_no_fault(line):
    _, recipe, _, _, folder = line
    files.write_json(folder / "attempt.json", {"attempt": 3, "submission_id": "s"})
    old = read_attempt(folder)
    assert old and old.attempt == 3 and follow_where(folder, recipe.ray, {}) == recipe.ray
    (folder / "attempt.json").write_text("{")
    assert read_attempt(folder) is None and follow_where(folder, recipe.ray, {}) == recipe.ray


def test_a_cluster_that_is_stopped_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    from tasks.ppo import cluster

    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    mine, other = (cluster._temp_folder(tmp_path / name) for name in ("a", "b"))
    for folder in (mine, other):
        (folder / "session_1" / "sockets").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    stop_locally(tmp_path / "a")
    assert not mine.exists() and other.exists()
    shutil.rmtree(other)


@pytest.fixture
def opened(line, clusters):
    """A cluster where a job of the run stays RUNNING."""
    clusters[0].is_quick = False
    jobs = RayJobs(clusters[0].url, {})
    yield Opened(jobs=jobs, python="python", is_ours=False)
    jobs.close()


def test_a_cancel_while_the_dashboard_is_busy_stops_the_job(line, clusters, opened):
    _, recipe, _, _, folder = line
    ray = clusters[0]

    def cancel(line, number):
        ray.faults = [503, None, 503]
        raise KeyboardInterrupt

    name = leave_job(folder, ray)
    with pytest.raises(KeyboardInterrupt):
        run.run_job(opened, "x", "never submitted", recipe, folder, cancel)
    assert ray.jobs[name]["status"] == "STOPPED" and not ray.submissions


def test_a_second_follower_of_a_log_that_ray_has_cut_logs_each_line_once(line, clusters, opened, caplog):
    _, recipe, _, _, folder = line
    ray = clusters[0]
    job = ray.jobs[leave_job(folder, ray)]
    lines = [f"step:{number} - critic/score/mean:0.5" for number in range(60)]
    job["logs"] = "".join(f"{line}\n" for line in lines[:30])
    ray.log_chars, told = 1200, []

    def lose(line, number):
        if line == lines[29]:
            raise asyncio.CancelledError  # the job goes on

    with caplog.at_level("INFO"), pytest.raises(asyncio.CancelledError):
        run.run_job(opened, "x", "never submitted", recipe, folder, lose)
    job |= {"logs": "".join(f"{line}\n" for line in lines), "status": "SUCCEEDED"}
    assert len(job["logs"]) > ray.log_chars
    with caplog.at_level("INFO"):
        run.run_job(opened, "x", "never submitted", recipe, folder, lambda line, number: told.append(line))
    assert told == lines and (folder / "job-1.log").read_text().splitlines() == lines
    assert caplog.text.count("step:") == 60
