"""Trainings of the tiny model as jobs of a cluster, SLURM's or Ray's, in two processes on two nodes."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.metrics import read_metrics
from tasks.specs import LaunchSpec, LoraSpec, TrainSpec
from tests.tasks.train.runs import SPEC
from tests.waiting import wait_for

LORA_ONLY = LoraSpec(target_modules=("q_proj",))
LAUNCH = LaunchSpec(
    launcher="slurm",
    nodes=2,
    address="127.0.0.1",  # both nodes are this machine
    environment={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    poll_s=0.5,
    time_limit="30",
)
ONE = SPEC.model_copy(update={"max_steps": 8, "rows_per_device": 1, "gradient_accumulation": 2, "save_steps": 4})
TWO = ONE.model_copy(update={"launch": LAUNCH})  # the same key: the same run in another place

LONG = ONE.model_copy(update={"max_steps": 100, "learning_rate": 2e-3, "save_steps": 10, "launch": LAUNCH})
LONG_HERE = SPEC.model_copy(  # the same two processes, by torchrun on this machine
    update={
        **LONG.model_dump(include={"max_steps", "learning_rate", "save_steps", "rows_per_device"}),
        "num_processes": 2,
    }
)


def launched(spec: TrainSpec, **changes: object) -> TrainSpec:
    """The same run with another launch."""
    return spec.model_copy(update={"launch": LaunchSpec.model_validate(LAUNCH.model_dump() | changes)})


def losses(adapter: TrainedAdapter) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in read_metrics(adapter.path / "metrics.jsonl")]


def train_apart(packed: PackedDataset, base: BaseCheckpoint, spec: TrainSpec, store: ArtifactStore, log: Path):
    """Train in a process of its own, as a Prefect worker does, that can be killed; its log says how it went."""
    code = (
        "import json, logging, sys; from pathlib import Path\n"
        "from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset\n"
        "from tasks.specs import TrainSpec; from tasks.train.run import train_adapter\n"
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit('told'))\n"  # as Prefect's engine does
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')\n"
        "packed, base, spec = (kind.model_validate_json(word) for kind, word in\n"
        "    zip((PackedDataset, BaseCheckpoint, TrainSpec), sys.argv[2:]))\n"
        "store = ArtifactStore(Path(sys.argv[1]))\n"
        "print(train_adapter(packed, base, spec, store, lambda record: None).adapter_digest)\n"
    )
    words = [str(store.root), *(value.model_dump_json() for value in (packed, base, spec))]
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-u", "-c", code, *words], stdout=output, stderr=output)


def assert_near(adapter, one) -> None:
    assert losses(adapter) == pytest.approx(losses(one), abs=2e-4)  # sums in another order, as between two processes
    tensors, others = (load_file(str(Path(a.adapter_folder) / "adapter_model.safetensors")) for a in (adapter, one))
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() < 1e-3 * others[name].norm(), name


class Run:
    """A training in a process of its own, and what it leaves."""

    def __init__(self, inputs: tuple[PackedDataset, BaseCheckpoint], folder: Path, spec: TrainSpec = LONG) -> None:
        self.store, self.log = ArtifactStore(folder / "home"), folder / "log"
        self.inputs, self.spec = inputs, spec
        self.process = train_apart(*inputs, spec, self.store, self.log)

    def start_again(self) -> None:
        self.process = train_apart(*self.inputs, self.spec, self.store, self.log)

    def says(self, words: str) -> bool:
        return words in self.log.read_text()

    @property
    def folder(self) -> Path:
        return next((self.store.root / "adapter").glob("[!.]*"))

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            found = (self.store.root / "adapter").glob("*/metrics.jsonl")
            return any(record["step"] >= step for path in found for record in read_metrics(path))

        wait_for(is_there, 300)

    def ends(self) -> int:
        return self.process.wait(240)

    def assert_is(self, whole) -> None:
        """It is to the bit what nothing happened to."""
        (adapter,) = self.store.committed(TrainedAdapter)
        assert losses(adapter) == losses(whole)
        files = [Path(one.adapter_folder) / "adapter_model.safetensors" for one in (adapter, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()  # the config's lists are sets of PEFT's, in any order
