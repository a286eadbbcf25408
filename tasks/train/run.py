"""Start and watch the trainer process; turn its end into an artifact or an error.

    PackedDataset + BaseCheckpoint + TrainSpec -> tasks.train.worker -> adapter/

Ring: edge. Imports no torch.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tasks import files, machine, ray_job, slurm
from tasks.artifacts import (
    LATEST,
    ArtifactStore,
    BaseCheckpoint,
    PackedDataset,
    TrainedAdapter,
    make_key,
)
from tasks.costs import peak_flops
from tasks.errors import CapacityError, CorruptError, MissingError, OutOfMemoryError, SpecError
from tasks.launch_script import require_plain
from tasks.model_config import complete_config
from tasks.models import base_shapes, is_origin_of
from tasks.specs import BaseModelSpec, LoraSpec, TrainSpec
from tasks.targets import Target, find_targets
from tasks.train.duration import step_seconds
from tasks.train.flops import flops_per_token
from tasks.train.needs import require_aligned
from tasks.train.placement import fit_processes
from tasks.train.plan import StepPlan, Workload, plan_step, say_plan, smaller_plan
from tasks.train.weights import require_offloadable
from tasks.trainer_job import ProgressFn, Terms, made_adapter, run_trainer

VERSION = 3  # 3: validation losses are means over tokens
TRAINER = "tasks.train.worker"
_BFLOAT16_SINCE = 8.0  # compute capability: Ampere; a T4 is 7.5
logger = logging.getLogger(__name__)
RoomFn = Callable[[], None]  # frees a GPU that is ours to free, before memory is looked at


def train_adapter(
    packed: PackedDataset,
    base: BaseCheckpoint,
    spec: TrainSpec,
    store: ArtifactStore,
    on_progress: ProgressFn,
    make_room: RoomFn = lambda: None,
) -> TrainedAdapter:
    """Train an adapter, resuming what an earlier try left; a second call returns the finished one.

    Raises: SpecError (a target hits nothing), CapacityError, OutOfMemoryError, TrainingError.
    """
    key = make_key("train", VERSION, spec, {}, (packed, base))
    with store.claim(TrainedAdapter, key) as claim:
        if claim.found:
            return claim.found
        require_warm(packed.num_train_rows, spec)
        if not spec.launch.is_elsewhere:  # its GPUs are elsewhere
            make_room()
        if slow := say_slow_dtype(spec):
            logger.warning("%s", slow)
        placed = fit_processes(spec, available_processes(spec))  # the key stays that of the planned number
        if placed.num_processes != spec.num_processes:
            logger.info("%d processes instead of %d, same batch", placed.num_processes, spec.num_processes)
        work = _workload(base, packed, placed)
        files.require_disk(claim.folder, checkpoint_bytes(work.num_trainable, spec), "training")
        job = {
            "folder": str(claim.folder),
            "spec": placed.model_dump(mode="json"),
            "base_folder": base.model_folder,
            "packed_folder": packed.folder,
            "row_tokens": packed.row_tokens,
            "flops_per_token": _flops_per_token(work, packed),
        }
        terms = Terms(
            num_processes=placed.num_processes,
            launch=spec.launch,
            stall_timeout_s=spec.stall_timeout_s,
            heartbeat_timeout_s=spec.heartbeat_timeout_s,
            stop_grace_s=spec.stop_grace_s,
            variables=wandb_variables(os.environ, key, store.root) if spec.report_to == "wandb" else {},
        )
        result, plans = _run_planned(work, job, terms, on_progress)
        artifact = made_adapter(key, claim.folder, (packed, base), base, result)
        return claim.commit(artifact, spec=spec, about={"plans": plans})


def available_processes(spec: TrainSpec) -> int:
    """Return how many training processes this machine takes: one a GPU; without a GPU as many as are planned.

    TATARA_TRAIN_PROCESSES lowers it, on a machine whose other GPUs are somebody else's.
    """
    said = os.environ.get("TATARA_TRAIN_PROCESSES") or str(spec.num_processes)
    if not said.isdecimal():
        raise SpecError(f"TATARA_TRAIN_PROCESSES is {said!r}, expected a number of processes: change or unset it")
    limit = int(said)
    return min(limit, len(machine.list_gpus()) or limit)


def wandb_variables(variables: Mapping[str, str], key: str, root: Path) -> dict[str, str]:
    """Return what the trainer's W&B needs of our environment: its own variables, one run per adapter, and a place.

    Without WANDB_API_KEY the run is kept offline. A resumed run goes on with the run that it began.
    """
    own = {name: value for name, value in variables.items() if name.startswith("WANDB_")}
    offline = {} if own.get("WANDB_API_KEY") else {"WANDB_MODE": "offline"}

    run = {"WANDB_RUN_ID": key[:16], "WANDB_RESUME": "allow", "WANDB_DIR": str(root)}
    return {"WANDB_PROJECT": "tatara", **own, **offline, **run}


def planned_steps(num_rows: int, spec: TrainSpec) -> int:
    """Return the number of optimizer steps of a run, counted as Trainer counts them.

    >>> planned_steps(10, TrainSpec(lora=LoraSpec(target_modules=("q_proj",)), gradient_accumulation=4, num_epochs=2))
    6
    """
    if spec.max_steps > 0:
        return spec.max_steps
    batches = math.ceil(num_rows / (spec.rows_per_device * spec.num_processes))
    return math.ceil(spec.num_epochs * max(1, math.ceil(batches / spec.gradient_accumulation)))


def require_warm(num_rows: int, spec: TrainSpec) -> None:
    """Raise SpecError when the warm-up lasts as long as the run: the learning rate would never reach its value."""
    planned = planned_steps(num_rows, spec)
    if spec.warmup_steps >= planned:
        by_rows = f"{num_rows} packed rows", "lower warmup_steps or gradient_accumulation, or train more epochs"
        why, way_out = by_rows if spec.max_steps < 0 else ("max_steps", "lower warmup_steps or raise max_steps")
        raise SpecError(
            f"TrainSpec.warmup_steps = {spec.warmup_steps} but the run has {planned} optimizer steps ({why}): {way_out}"
        )


def find_adapter(name: str, base: BaseModelSpec, store: ArtifactStore) -> TrainedAdapter:
    """Return the trained adapter whose key begins with `name`, or for `latest` the newest one of this base.

    Raises: MissingError listing what exists, SpecError when several fit.
    """
    found = store.choose(TrainedAdapter, name, lambda adapter: _is_made_from(base, adapter, store))
    if found is None:
        known = ", ".join(adapter.short for adapter in store.known(TrainedAdapter)) or "none"
        of_base = f" of {base.model}" if name == LATEST else ""
        raise MissingError(f"there is no adapter {name!r}{of_base} below {store.root}; there are: {known}")
    return found


def _is_made_from(base: BaseModelSpec, adapter: TrainedAdapter, store: ArtifactStore) -> bool:
    try:
        return is_origin_of(base, store.ancestor(adapter, BaseCheckpoint, needs_files=False).origin)
    except MissingError:  # its base was removed
        return False


def plan_targets(base: BaseCheckpoint, lora: LoraSpec) -> list[Target]:
    """Return what the adapter will be put on. Raises SpecError when a target hits nothing."""
    return find_targets(base_shapes(Path(base.model_folder)), lora)


def _workload(base: BaseCheckpoint, packed: PackedDataset, spec: TrainSpec) -> Workload:
    shapes = base_shapes(Path(base.model_folder))
    config = complete_config(files.read_json(Path(base.model_folder) / "config.json"), shapes)
    require_aligned(config, spec)
    targets = find_targets(shapes, spec.lora)
    require_offloadable(config, spec, targets)
    return Workload(
        shapes=shapes,
        config=config,
        spec=spec,
        targets=targets,
        row_tokens=packed.row_tokens,
        document_tokens=packed.num_train_tokens / packed.num_train_documents,
        num_steps=planned_steps(packed.num_train_rows, spec),
    )


def _run_planned(
    work: Workload, job: dict[str, Any], terms: Terms, on_progress: ProgressFn
) -> tuple[dict[str, Any], list[str]]:  # Any: JSON values
    """Run the trainer under the plan that fits; after an out of memory under a smaller one, from its last step on.

    Returns: the trainer's result, and every plan in words.
    """
    folder = Path(job["folder"])
    kept = _plans_file(folder, work.spec)
    plans = _read_plans(kept)
    if not plans or plans[-1].num_rows != work.num_rows:  # the second: on another number of processes than before
        plans = [plan_step(work, gpu_room(work.spec), host_room(work.spec))]
        require_training_memory(work, plans[0])
        files.write_json(kept, [asdict(plans[0])])
    while True:
        logger.info("%s", _say_step(work, plans[-1]))
        try:
            result = run_trainer(TRAINER, folder, {**job, "plan": asdict(plans[-1])}, terms, on_progress)
        except OutOfMemoryError as error:
            smaller = smaller_plan(work, plans[-1], host_room(work.spec)) if work.spec.fit_micro_batch else None
            if smaller is None:
                raise
            logger.warning("%s; the rows of a step stay, and it goes on with smaller passes", error)
            plans.append(smaller)
            files.write_json(kept, [asdict(plan) for plan in plans])
        else:
            return result, [_say_step(work, plan) for plan in plans]


def _plans_file(folder: Path, spec: TrainSpec) -> Path:
    """Return where the plans of a run's tries are: what ran out of memory once is not tried again.

    Where the base is shared out, or rests on the host, another plan fits.

    >>> spec = TrainSpec(lora=LoraSpec(target_modules=("q_proj",)), offload_layers=-1)
    >>> _plans_file(Path("/run"), spec).name
    'plans_offload_-1.json'
    """
    if spec.offload_layers:
        return folder / f"plans_offload_{spec.offload_layers}.json"
    return folder / ("plans.json" if spec.parallel == "ddp" else "plans_fsdp2.json")


def _read_plans(path: Path) -> list[StepPlan]:
    """Return the plans of earlier tries; none when they can't be read, since a step can always be planned again."""
    try:
        return [StepPlan(**plan) for plan in files.read_json(path)]
    except FileNotFoundError:
        return []
    except (CorruptError, TypeError) as error:
        logger.warning("%s is of no use (%s): the step is planned again", path, error)
        return []


def _say_step(work: Workload, plan: StepPlan) -> str:
    said, gpus = say_plan(work, plan), training_gpus(work.spec)
    seconds = step_seconds(work, plan, peak_flops(gpus[0].name)) if gpus else None
    if seconds is None:
        return said
    return f"{said}; about {seconds:.2f} s a step on {gpus[0].name}, {seconds * work.num_steps / 60:.0f} min in all"


def say_slow_dtype(spec: TrainSpec) -> str:
    """Say that this machine's GPU only imitates the recipe's dtype, and the way out; "" when it does not."""
    is_here = not spec.launch.is_elsewhere
    old = machine.old_gpus(_BFLOAT16_SINCE) if is_here and spec.dtype == "bfloat16" else []
    if not old:
        return ""
    return f"{old[0]} computes bfloat16 by imitation, many times slower: set TrainSpec.dtype to float32 there"


def training_gpus(spec: TrainSpec) -> list[machine.Gpu]:
    """Return the GPUs that a run may have: this machine's, for each of several alike, or those that a job asks for."""
    launch = spec.launch
    if launch.launcher == "local":
        return machine.list_gpus()
    if launch.launcher == "torchrun":
        return machine.list_gpus()[: launch.node_processes] * launch.nodes
    size = int(launch.gpu_memory_gb * 1e9)
    name = f"{launch.gpu_type.upper()} {launch.gpu_memory_gb:g}GB".strip()
    return [machine.Gpu(name=name, total_bytes=size, free_bytes=size)] * (launch.nodes * launch.gpus_per_node)


def launched_spec(spec: TrainSpec) -> TrainSpec:
    """Return the spec on the number of processes that its launch starts; on this machine alone as it is planned."""
    return fit_processes(spec, spec.num_processes)


def check_launch(spec: TrainSpec, root: Path) -> str:
    """Say where a run's processes will be. Raises: SpecError, MissingError, CapacityError if it can't work."""
    launch = spec.launch
    if launch.launcher == "local":
        return ""
    fit_processes(spec, launch.num_processes)
    where = f"{launch.nodes} machines with {launch.node_processes} processes each"
    if launch.launcher == "torchrun":
        return f"launch: {where}, this one and others that are started by hand"
    if launch.launcher == "ray":
        return f"launch: {ray_job.check_cluster(launch)}, {where}"
    require_plain(str(root.resolve()))
    return f"launch: {slurm.require_commands()}, {where}"


def gpu_room(spec: TrainSpec, *, ours_leaves: bool = False) -> int | None:
    """Return what the tightest GPU of a run has free; None without a GPU."""
    used = training_gpus(spec)[: spec.num_processes]
    return min((gpu.total_bytes if ours_leaves else gpu.free_bytes for gpu in used), default=None)


def host_room(spec: TrainSpec) -> int | None:
    """Return what this host has free; None where a run's processes are on other ones."""
    return None if spec.launch.is_elsewhere else machine.available_memory_bytes()


def _flops_per_token(work: Workload, packed: PackedDataset) -> float:
    return flops_per_token(
        work.config,
        work.targets,
        work.document_tokens,
        packed.num_learnt_tokens / packed.num_train_tokens,
    )


def checkpoint_bytes(num_trainable: int, spec: TrainSpec) -> int:
    """Return the disk that checkpoints take: those that are kept, the one being written, the adapter."""
    return (spec.keep_checkpoints + 2) * 12 * num_trainable + (64 << 20)


def require_training_memory(work: Workload, plan: StepPlan, *, ours_leaves: bool = False) -> str:
    """Say what training needs and what is there. Raises CapacityError when it can't fit.

    Each process of a run has a GPU of its own, so one has to hold it; without a GPU the host does. What our own
    vLLM holds counts as free when it leaves before the training (`ours_leaves`).
    """
    spec, needed, said = work.spec, sum(work.needs(plan).values()), f"training takes {say_plan(work, plan)}"
    gpus = training_gpus(spec)
    is_here = not spec.launch.is_elsewhere
    lower = "lower TrainSpec.rows_per_device or PackSpec.row_tokens"
    way_out = f"{lower}, choose nf4, a smaller base, offload_layers=-1, or more GPUs with parallel='fsdp2'"
    if not gpus and not is_here:
        return f"{said}, on CPU nodes whose memory is not known here"
    if not gpus:
        available = machine.available_memory_bytes()
        if needed > available:
            raise CapacityError(
                f"{said} but there is no GPU and {available / 1e9:.1f} GB of memory are available: use a machine with "
                f"a GPU, or {way_out}"
            )
        return f"{said}, {available / 1e9:.1f} GB of memory are available"
    copies = work.host_bytes(plan) // spec.launch.nodes
    gates = f", and the gate of {plan.num_shelved} layers there" if plan.num_shelved else ""
    more = ", or checkpointing='selective'" if plan.num_shelved else ""
    if is_here and plan.num_offloaded:
        way = "lower TrainSpec.offload_layers, or choose nf4"
        what = f"letting {plan.num_offloaded} layers of the base rest on the host"
        machine.require_memory(copies, what + gates, way + more)
    elif is_here:
        way = "store it in TrainSpec.dtype, or parallel='ddp'"
        machine.require_memory(copies, "loading the base in each process" + gates, way + more)
    used = gpus[: spec.num_processes]
    if ours_leaves:
        used = [replace(gpu, free_bytes=gpu.total_bytes) for gpu in used]
    tightest = min(used, key=lambda gpu: gpu.free_bytes)
    if len(used) < spec.num_processes:
        raise CapacityError(
            f"TrainSpec.num_processes = {spec.num_processes} but this machine has {len(gpus)} GPUs: lower it"
        )
    if needed > tightest.free_bytes:
        busy = (tightest.total_bytes - tightest.free_bytes) / 1e9
        freeing = f"free the {busy:.1f} GB that are in use (`tatara services stop` ends vLLM), or " if busy > 2 else ""
        raise CapacityError(
            f"{said} of GPU memory but {tightest.free_bytes / 1e9:.1f} of {tightest.total_bytes / 1e9:.1f} GB of the "
            f"{tightest.name} are free: {freeing}{way_out}"
        )
    return f"{said} of GPU memory, {tightest.free_bytes / 1e9:.1f} GB of the {tightest.name} are free"
