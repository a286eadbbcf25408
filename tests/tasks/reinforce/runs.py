"""GRPO runs of a tiny gpt-oss in processes that can be killed; forked from one with torch loaded."""

import csv
import json
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.errors import TrainingError
from tasks.reinforce.streams import read_rows
from tasks.specs import LoraSpec, ReinforceSpec, RewardSpec
from tests.commands import write_commands
from tests.waiting import wait_for

LORA = LoraSpec(
    rank=2,
    alpha=4,
    target_modules=("q_proj", "v_proj", "o_proj"),
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)
SPEC = ReinforceSpec(
    lora=LORA,
    rewards=(
        RewardSpec(name="characters", arguments={"pattern": "[0-9]"}, label="digits"),
        RewardSpec(name="length", weight=0.5, arguments={"most": 4}),
    ),
    max_sequence_tokens=128,
    max_completion_tokens=8,
    num_generations=8,
    rows_per_device=32,
    gradient_accumulation=1,
    learning_rate=2e-2,
    lr_scheduler="constant",
    max_steps=6,
    quantization="none",
    dtype="float32",
    save_steps=2,
)
DYING = (*SPEC.rewards, RewardSpec(name="tests.tasks.reinforce.broken_rewards:die_after_a_checkpoint"))
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tasks.reinforce.worker", "tests.tasks.reinforce.runs"])


def write_questions(path: Path, count: int = 24) -> Path:
    """Write sums as a *_q_dataset.csv."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["question", "answer"])
        writer.writerows([[f"{number % 5}+{number}=?", str(number % 5 + number)] for number in range(count)])
    return path


def save_base(folder: Path, head_dim: int = 8) -> Path:
    """Save the random tiny model with a head that can prefer one token: its own logits stay within half a nat."""
    import torch

    from tests.tiny import byte_tokenizer, make_model

    model = make_model(head_dim=head_dim)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_artifacts(store: ArtifactStore, folder: Path, head_dim: int = 8) -> tuple[PackedDataset, BaseCheckpoint]:
    """A base and packed questions; their sources lie below `folder`."""
    from huggingface_hub import HfApi

    from tasks.fetch.run import fetch_base, fetch_dataset
    from tasks.pack.run import pack_dataset
    from tasks.specs import BaseModelSpec, FetchSpec, PackSpec

    folder.mkdir(parents=True, exist_ok=True)
    base = fetch_base(BaseModelSpec(model=str(save_base(folder / "base", head_dim))), store, HfApi(token=False))
    file = write_questions(folder / "sums_q_dataset.csv")
    source = FetchSpec(source=str(file), question_column="question", answer_column="answer", validation_pct=20)
    dataset = fetch_dataset(source, store, HfApi(token=False))
    return pack_dataset(dataset, base, PackSpec(row_tokens=96), store), base


def make_inputs(folder: Path) -> dict[str, Any]:
    """The part of a job that says where base and questions are."""
    packed, base = make_artifacts(ArtifactStore(folder / "home"), folder)
    return {"base_folder": base.model_folder, "packed_folder": packed.folder, "start_adapter": None}


def start(inputs: dict[str, Any], folder: Path, spec: ReinforceSpec, tamper: str = "") -> BaseProcess:
    """Begin, or go on with, a run in `folder`. `tamper` names a function of this module that runs first."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {**inputs, "folder": str(folder), "spec": spec.model_dump(mode="json")}
    process = _processes.Process(target=_work, args=(job, tamper))
    process.start()
    return process


def run(inputs: dict[str, Any], folder: Path, spec: ReinforceSpec, tamper: str = "") -> dict[str, Any]:
    """Learn to the end; return what the worker said: its result, or its failure."""
    process = start(inputs, folder, spec, tamper)
    process.join(200)
    assert not process.is_alive()
    told = folder / ("result.json" if (folder / "result.json").exists() else "failure.json")
    assert told.exists(), (folder / "output.log").read_text()[-3000:]
    return json.loads(told.read_text())


def _work(job: dict[str, Any], tamper: str) -> None:
    folder = Path(job["folder"])
    log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from tasks.reinforce import worker
    from tasks.training import run_worker

    if tamper:
        globals()[tamper]()
    run_worker(folder, lambda: worker.reinforce(job), stop_grace_s=job["spec"]["stop_grace_s"])


def kill_at(process: BaseProcess, folder: Path, step: int) -> None:
    """SIGKILL once metrics.csv holds that step."""
    assert process.pid
    wait_for(lambda: not process.is_alive() or last_step(folder) >= step, 120)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.csv")
    return int(rows[-1]["step"]) if rows else 0


def show_an_h200(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what looks for a GPU find one: `rollouts: auto` chooses vLLM for it."""
    write_commands(folder, {"nvidia-smi": "echo GPU-a1, NVIDIA H200, 143771, 143000"})
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def ignore_the_adapter() -> None:
    """What a broken engine does: the rollouts come from the base."""
    from tasks.reinforce.group import GroupTrainer

    generate: Any = GroupTrainer._generate_single_turn

    def from_the_base(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return generate(self, *args, **kwargs)

    GroupTrainer._generate_single_turn = from_the_base


def drop_the_experts() -> None:
    """What another broken engine does: it runs the adapter of the attention and drops that of the experts."""
    from peft.tuners.lora.layer import ParamWrapper

    from tasks.reinforce.group import GroupTrainer

    generate: Any = GroupTrainer._generate_single_turn

    def without_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrappers = [module for module in self.model.modules() if isinstance(module, ParamWrapper)]
        for wrapper in wrappers:
            wrapper._disable_adapters = True
        try:
            return generate(self, *args, **kwargs)
        finally:
            for wrapper in wrappers:
                wrapper._disable_adapters = False

    GroupTrainer._generate_single_turn = without_experts


def assert_a_killed_run_is_the_same(
    packed: PackedDataset, base: BaseCheckpoint, spec: ReinforceSpec, learnt: TrainedAdapter, home: Path
) -> None:
    """Run again below `home`, SIGKILL it in step 5, go on: adapter and generations are those of `learnt`.

    `spec` has the `DYING` reward: a follower that looks once a second can come when six quick steps are over.
    """
    from tasks.reinforce.run import reinforce_adapter

    store = ArtifactStore(home)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="died without a result"):
        patch.setenv("DIES_AFTER", f"{home}:checkpoint-4")
        reinforce_adapter(packed, base, spec, store, lambda record: None)
    again = reinforce_adapter(packed, base, spec, store, lambda record: None)
    assert "resuming from checkpoint-4" in (again.path / "output.log").read_text()
    for name in ("adapter/adapter_model.safetensors", "generations.csv"):
        assert (again.path / name).read_bytes() == (learnt.path / name).read_bytes(), name
