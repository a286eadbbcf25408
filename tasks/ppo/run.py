"""Reinforce a model by PPO: verl's main_ppo as a Ray job, followed to its end, its checkpoint made a model folder.

    PreparedQuestions + BaseCheckpoint + PpoRecipe -> cluster -> job -> global_step_N/actor -> model/

Ring: edge.
"""

import asyncio
import contextlib
import logging
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks import files
from tasks.artifacts import (
    CHECKPOINTS,
    ArtifactStore,
    BaseCheckpoint,
    PreparedQuestions,
    ReinforcedModel,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.errors import MissingError, SpecError, TrainingError, TransientError
from tasks.metrics import read_metrics
from tasks.ppo.attempts import choose_attempt, follow_where, is_there
from tasks.ppo.cluster import Cluster, open_cluster, require_fit
from tasks.ppo.command import Inputs, count_steps, entrypoint, job_variables
from tasks.ppo.console import make_record, read_step
from tasks.ppo.metrics import StepLog
from tasks.ray_follow import Health, Patience, follow, last_lines, submit, try_to_stop
from tasks.ray_jobs import Job, JobState, RayJobs
from tasks.specs import PpoRecipe, PpoSpec, RaySpec

VERSION = 1
VERSIONS = "cluster_versions.json"  # of Python, Ray and verl where the job was submitted
_STOP_S = 30.0
ProgressFn = Callable[[dict[str, Any]], None]  # Any: a metrics record
RoomFn = Callable[[], None]  # frees a GPU that is ours to free
logger = logging.getLogger(__name__)


def reinforce_model(
    questions: PreparedQuestions,
    base: BaseCheckpoint,
    recipe: PpoRecipe,
    store: ArtifactStore,
    on_progress: ProgressFn,
    variables: Mapping[str, str],
    make_room: RoomFn = lambda: None,
) -> ReinforcedModel:
    """Train a whole model with rewards; a second call returns the finished one, a killed one goes on.

    `make_room` is called before a job begins on a cluster of this machine.

    Raises: SpecError, CapacityError (the cluster lacks something), TrainingError with the job's last lines,
        TransientError (the cluster is away; its job goes on and is followed by the next try).
    """
    spec = recipe.ppo
    with store.claim(ReinforcedModel, model_key(questions, base, spec)) as claim:
        if claim.found:
            return claim.found
        folder = claim.folder
        inputs = Inputs(
            train_file=str(questions.path / "train.parquet"),
            test_file=str(questions.path / "test.parquet"),
            model=base.model_folder,
            checkpoints=str(folder / CHECKPOINTS),
        )
        num_steps = require_steps(questions, spec)
        recipe = recipe.model_copy(update={"ray": follow_where(folder, recipe.ray, variables)})
        with open_cluster(recipe.ray, spec, folder, variables) as cluster:
            if not is_there(cluster.jobs, folder):  # a job that runs has shown that it can, and holds what is asked for
                paths = [inputs.train_file, inputs.test_file, inputs.model, str(folder)]
                files.write_json(folder / VERSIONS, require_fit(cluster, recipe.ray, spec, paths))
                if cluster.is_ours:  # another cluster's GPUs are not ours to free
                    make_room()
            command = entrypoint(cluster.python, spec, inputs)
            teller = Teller(folder / "metrics.jsonl", num_steps, on_progress)
            run_job(cluster, claim.key, command, recipe, folder, teller)
            model_folder = _merge(cluster, claim.key, recipe, folder)
        records = read_metrics(folder / "metrics.jsonl")
        digests = digest_files(model_folder)
        artifact = ReinforcedModel(
            key=claim.key,
            folder=str(folder),
            parents=(questions.ref, base.ref),
            model_folder=str(model_folder),
            origin=f"PPO {claim.key[:8]} of {base.origin}",
            model_digest=folder_digest(digests),
            num_parameters=_count_parameters(model_folder),
            base_folder=base.model_folder,
            base_digest=base.model_digest,
            num_steps=records[-1]["step"] if records else 0,
            test_score_before=next((r["test_score"] for r in records if "test_score" in r and r["step"] == 0), None),
            test_score_after=next((r["test_score"] for r in reversed(records) if "test_score" in r), None),
        )
        about = {
            "digests": digests,
            "stamp": files.stamp(model_folder),
            "command": command,
            "versions": _read_versions(folder),
        }
        return claim.commit(artifact, spec=spec, about=about)


def model_key(questions: PreparedQuestions, base: BaseCheckpoint, spec: PpoSpec) -> str:
    """Return the key of the model that PPO makes of these."""
    return make_key("ppo", VERSION, spec, {}, (questions, base))


def _read_versions(folder: Path) -> dict[str, str]:
    path = folder / VERSIONS
    return files.read_json(path) if path.exists() else {}


def require_steps(questions: PreparedQuestions, spec: PpoSpec) -> int:
    """Return the number of steps. Raises SpecError when the questions make none."""
    num_steps = count_steps(questions.num_train_rows, spec)
    if questions.num_train_rows < spec.train_batch_size or num_steps == 0:
        raise SpecError(
            f"PpoSpec.train_batch_size = {spec.train_batch_size} but there are {questions.num_train_rows} training "
            "questions, and verl drops a batch that is not full: lower it or add questions"
        )
    return num_steps


class Teller:
    """What becomes of a job's lines: each to the log once, verl's steps to metrics.jsonl and the progress."""

    def __init__(self, path: Path, num_steps: int, on_progress: ProgressFn) -> None:
        self._steps, self._num_steps, self._on_progress = StepLog(path), num_steps, on_progress

    def __call__(self, line: str, attempt: int) -> None:
        """Take one line."""
        found = read_step(line)
        if found is None:
            return
        record = make_record(*found, self._num_steps, attempt)
        if self._steps.add(record):
            self._on_progress(record)


def run_job(
    cluster: Cluster, key: str, command: str, recipe: PpoRecipe, folder: Path, tell: Callable[[str, int], None]
) -> None:
    """Run the trainer's job to its end, or follow the one that an earlier run of this question left there.

    A person's cancel (SIGTERM) and an error of ours stop the job; a cluster that is away, and a cancellation from
    inside Prefect, leave it to the next run. verl goes on from its newest checkpoint.
    Raises: TrainingError with the last lines of a job that failed.
    """
    attempt = choose_attempt(cluster, key, folder)
    job = Job(
        submission_id=attempt.submission_id,
        entrypoint=command,
        env_vars=job_variables(recipe.ppo),
        metadata={"tatara_key": key},
    )
    number = attempt.attempt
    _run(cluster.jobs, job, recipe.ray, folder / f"job-{number}.log", lambda line: tell(line, number))


def _run(jobs: RayJobs, job: Job, ray: RaySpec, log: Path, tell: Callable[[str], None]) -> None:
    lines = _LogFile(log)
    health = Health("verl will fail or hang on it")

    def take(line: str) -> None:
        if lines.add(line):
            logger.info("%s", line)
        tell(line)

    patience = Patience(poll_s=ray.poll_s, health_s=ray.health_s, lost_after_s=ray.lost_after_s)
    try:
        submit(jobs, job, patience)
        state = follow(jobs, job.submission_id, patience, take, health, lines.read_kept)
    except (asyncio.CancelledError, TransientError):
        logger.warning("job %s goes on without us; the next run of this follows it", job.submission_id)
        raise
    except BaseException:
        try_to_stop(jobs, job.submission_id, _STOP_S)
        raise
    finally:
        lines.close()
    _require_success(state, job, log, health)


class _LogFile:
    """The log of one job on disk, by which a follower that was started again tells which lines were told before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = len(self.read_kept())
        self._handle = path.open("a")
        self._seen = 0

    def read_kept(self) -> list[str]:
        """Return the lines that are there."""
        return self._path.read_text(errors="replace").splitlines() if self._path.exists() else []

    def add(self, line: str) -> bool:
        """Append a line unless it is there; return whether it was new."""
        self._seen += 1
        if self._seen <= self._told:
            return False
        self._handle.write(line + "\n")
        self._handle.flush()
        return True

    def close(self) -> None:
        """Give the file back."""
        self._handle.close()


def _require_success(state: JobState, job: Job, log: Path, health: Health) -> None:
    if state.status == "SUCCEEDED":
        return
    lost = f" Lost nodes: {', '.join(health.lost.values())}." if health.lost else ""
    raise TrainingError(
        f"Ray job {job.submission_id} {state.status.lower()} (exit code {state.exit_code}): "
        f"{state.message.strip().partition(chr(10))[0]}{lost} The next run goes on from verl's newest checkpoint. "
        f"Its last lines:\n{last_lines(log.read_text())}"
    )


def newest_checkpoint(folder: Path) -> Path:
    """Return the actor's folder of verl's newest whole checkpoint. Raises MissingError without one."""
    told = folder / "latest_checkpointed_iteration.txt"  # written last, when all of a checkpoint is there
    with contextlib.suppress(OSError, ValueError):
        actor = folder / f"global_step_{int(told.read_text())}" / "actor"
        if actor.is_dir():
            return actor
    raise MissingError(f"verl left no whole checkpoint below {folder}: is it on storage that every node shares?")


def _merge(cluster: Cluster, key: str, recipe: PpoRecipe, folder: Path) -> Path:
    """Make a transformers folder of the actor's shards, by verl's own merger, on the cluster."""
    actor, model = newest_checkpoint(folder / CHECKPOINTS), folder / "model"
    for left in folder.glob("model*"):
        shutil.rmtree(left, ignore_errors=True)
    name = f"{time.time_ns()}"
    aside = folder / f"model.{name}"  # of this merger alone: one that a killed parent left may still write its own
    words = [cluster.python, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(actor)]
    job = Job(
        submission_id=f"tatara-ppo-{key[:16]}-merge-{name}",
        entrypoint=shlex.join([*words, "--target_dir", str(aside)]),
        env_vars=job_variables(recipe.ppo),
    )
    log = folder / "merge.log"
    log.unlink(missing_ok=True)
    _run(cluster.jobs, job, recipe.ray, log, lambda line: None)
    aside.rename(model)
    return model


def _count_parameters(folder: Path) -> int:
    headers = (files.read_safetensors_header(path)[0] for path in files.weight_files(folder))
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
