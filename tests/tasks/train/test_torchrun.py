"""Two machines without SLURM: this process starts the first, join.sh the other; a rank is killed on the way."""

import json
import logging
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore
from tasks.errors import TrainingError
from tasks.specs import LaunchSpec
from tasks.train.run import train_adapter
from tests.ports import free_port
from tests.tasks.train.launched import ONE, losses
from tests.tasks.train.runs import make_artifacts


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_two_machines_by_hand_train_what_two_processes_do_also_when_a_rank_is_killed(tmp_path: Path, caplog):
    store = ArtifactStore(tmp_path / "home")
    planned = ONE.model_copy(update={"max_steps": 40, "learning_rate": 2e-3})
    here = planned.model_copy(update={"num_processes": 2, "gradient_accumulation": 1})
    packed, base = make_artifacts(store, tmp_path)
    one = train_adapter(packed, base, here, ArtifactStore(tmp_path / "one"), lambda record: None)
    launch = LaunchSpec(
        launcher="torchrun",
        nodes=2,
        address="127.0.0.1",
        master_port=free_port(),
        environment={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},  # sums in the same order, to the bit
    )
    two = planned.model_copy(update={"launch": launch})
    joined: list[subprocess.Popen[bytes]] = []

    def join(record: logging.LogRecord) -> bool:
        """Start join.sh when the log says so, as a person would: its words are the command."""
        said = re.search(r"other machine, with its number \(1\): (bash \S+/join.sh) NUMBER", record.getMessage())
        if said:
            words = [*said[1].split(), "1"]
            log = (tmp_path / "joined.log").open("ab")
            joined.append(subprocess.Popen(words, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]}))
        return True

    def kill(record: dict[str, float]) -> None:
        if record["step"] == 5:
            (folder,) = (store.root / "adapter").glob("[!.]*")
            os.kill(_pid_of_rank(folder, 1), signal.SIGKILL)

    trainer_log = logging.getLogger("tasks.trainer_job")
    trainer_log.addFilter(join)
    try:
        with caplog.at_level(logging.INFO), pytest.raises(TrainingError):
            train_adapter(packed, base, two, store, kill)
        trainer_log.removeFilter(join)  # it was started once, and goes on
        adapter = train_adapter(packed, base, two, store, lambda record: None)
        assert [process.wait(60) for process in joined] == [0]
    finally:
        trainer_log.removeFilter(join)
        for process in joined:
            process.terminate()
            process.wait()
    assert "resuming from checkpoint-" in (adapter.path / "output.log").read_text()
    assert losses(adapter) == losses(one)


def _pid_of_rank(folder: Path, rank: int) -> int:
    path = folder / "heartbeat.json" if rank == 0 else folder / f"heartbeats/{rank}.json"
    return json.loads(path.read_text())["pid"]
