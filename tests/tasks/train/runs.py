"""Trainings of a tiny gpt-oss in processes that can be killed; forked from one with torch loaded."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset
from tasks.metrics import read_metrics
from tasks.specs import LoraSpec, TrainSpec
from tasks.train.plan import StepPlan
from tests.ports import free_port
from tests.waiting import wait_for

LORA = LoraSpec(
    rank=2,
    alpha=4,
    target_modules=("q_proj", "v_proj"),
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)
SPEC = TrainSpec(
    lora=LORA,
    learning_rate=2e-2,
    max_steps=24,
    rows_per_device=2,
    dtype="float32",
    save_steps=4,
)
ROW_TOKENS = 128
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tasks.train.worker", "tests.tasks.train.runs"])


def make_artifacts(store: ArtifactStore, folder: Path) -> tuple[PackedDataset, BaseCheckpoint]:
    """A base and packed rows; their sources lie below `folder`."""
    from huggingface_hub import HfApi

    from tasks.fetch.run import fetch_dataset
    from tasks.pack.run import pack_dataset
    from tasks.specs import FetchSpec, PackSpec
    from tests.tiny import make_base, write_chats

    base = make_base(store, folder / "base")
    source = FetchSpec(source=str(write_chats(folder / "chats.jsonl", 60)), validation_pct=20)
    dataset = fetch_dataset(source, store, HfApi(token=False))
    return pack_dataset(dataset, base, PackSpec(row_tokens=ROW_TOKENS), store), base


def make_inputs(folder: Path) -> dict[str, Any]:
    """The part of a job that says where base and rows are."""
    packed, base = make_artifacts(ArtifactStore(folder / "home"), folder)
    return {"base_folder": base.model_folder, "packed_folder": packed.folder, "row_tokens": ROW_TOKENS}


def make_job(inputs: dict[str, Any], folder: Path, spec: TrainSpec) -> dict[str, Any]:
    """What the parent hands to the worker on a machine without a GPU."""
    plan = StepPlan(
        rows_per_device=spec.rows_per_device,
        gradient_accumulation=spec.gradient_accumulation,
        checkpointing="none",
        num_offloaded=spec.offload_layers,
    )
    return {**inputs, "folder": str(folder), "spec": spec.model_dump(mode="json"), "plan": asdict(plan)}


def start(inputs: dict[str, Any], folder: Path, spec: TrainSpec, tamper: str = "") -> BaseProcess:
    """Begin, or go on with, a training in `folder`. `tamper` names a function of this module that runs first."""
    return _start(make_job(inputs, folder, spec), tamper, {})


def start_ranks(inputs: dict[str, Any], folder: Path, spec: TrainSpec) -> list[BaseProcess]:
    """The same in `spec.num_processes` processes, as torchrun starts them; they talk by gloo."""
    job = make_job(inputs, folder, spec)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    count = str(spec.num_processes)
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(spec.num_processes))]
    return [_start(job, "", {**shared, **rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}) for rank in ranks]


def _start(job: dict[str, Any], tamper: str, variables: dict[str, str]) -> BaseProcess:
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    process = _processes.Process(target=_work, args=(job, tamper, variables))
    process.start()
    return process


def run(inputs: dict[str, Any], folder: Path, spec: TrainSpec, tamper: str = "") -> dict[str, Any]:
    """Train to the end; return what the worker said: its result, or its failure."""
    process = start(inputs, folder, spec, tamper)
    process.join(120)
    assert not process.is_alive()
    told = folder / ("result.json" if (folder / "result.json").exists() else "failure.json")
    return json.loads(told.read_text())


def run_ranks(inputs: dict[str, Any], folder: Path, spec: TrainSpec) -> dict[str, Any]:
    """Train to the end in several processes; return the result."""
    ranks = start_ranks(inputs, folder, spec)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), (folder / "output.log").read_text()[-3000:]
    return json.loads((folder / "result.json").read_text())


def _work(job: dict[str, Any], tamper: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    folder = Path(job["folder"])
    log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from tasks.train import worker
    from tasks.training import run_worker

    if tamper:
        globals()[tamper]()
    run_worker(folder, lambda: worker.train(job), stop_grace_s=job["spec"]["stop_grace_s"])


def kill(process: BaseProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def terminate(process: BaseProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)


def wait_for_step(folder: Path, step: int, process: BaseProcess) -> None:
    def there() -> bool:
        records = read_metrics(folder / "metrics.jsonl")
        return not process.is_alive() or (bool(records) and records[-1]["step"] >= step)

    wait_for(there, 60)


def losses(folder: Path) -> list[tuple[int, float, float, int]]:
    """What must not differ between two runs, of each step."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records]


def adapter_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def adapter_tensors(folder: Path) -> dict[str, Any]:
    return load_file(str(folder / "adapter" / "adapter_model.safetensors"))


def until(condition: Callable[[], bool], process: BaseProcess) -> bool:
    """Poll without sleeping long: some moments last a millisecond. False when the process ended before."""
    while process.is_alive():
        if condition():
            return True
        time.sleep(0.0005)
    return False


def hang_in_step_3() -> None:
    """The main thread stops for ever, its heartbeat does not."""
    from tasks.train.loss import FusedHeadTrainer

    learn, calls = FusedHeadTrainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            while True:
                try:
                    time.sleep(3600)
                except BaseException:  # noqa: BLE001 - a library that swallows everything
                    sys.stderr.write("swallowed\n")
        return learn(self, *args, **kwargs)

    FusedHeadTrainer.training_step = training_step


def _change_loss(factor: float, after: int) -> None:
    from tasks.train.loss import FusedHeadTrainer

    measure = FusedHeadTrainer.compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = measure(self, model, *args, **kwargs)
        return loss * factor if model.training and self.state.global_step >= after else loss

    FusedHeadTrainer.compute_loss = compute_loss


def freeze_one_tensor() -> None:
    """One adapter tensor gets gradients of zero, as experts did in trainers that said they had trained them."""
    from tasks.train import worker

    make = worker.make_trainer

    def make_trainer(*args: Any, **kwargs: Any) -> Any:
        trainer: Any = make(*args, **kwargs)
        for name, weight in trainer.model.named_parameters():
            if name.endswith("layers.1.mlp.experts.lora_A.default.weight"):
                weight.register_hook(lambda gradient: gradient * 0)
        return trainer

    worker.make_trainer = make_trainer


def unlearn_after_step_10() -> None:
    """From then on each step makes the model worse."""
    _change_loss(-1.0, 10)


def unlearn_after_step_1() -> None:
    """The first step is the best."""
    _change_loss(-1.0, 1)


def explode_after_step_12() -> None:
    """Ten times the loss, from then on."""
    _change_loss(10.0, 12)


def stop_as_trainer_does() -> None:
    """Training ends after step 5, normally: what transformers' enable_jit_checkpoint makes of a SIGTERM."""
    from tasks.training import Keeper

    ends = Keeper.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends(self, args, state, control, **kwargs)
        if state.global_step == 5:
            control.should_training_stop = control.should_save = True

    Keeper.on_step_end = on_step_end


def keep_nothing_of_adapters() -> None:
    """Each pass makes anew what it needs of the adapters."""
    from tasks.gptoss.product import Era

    Era.begin = lambda self: None
