"""Whether a recipe's training fits a machine, before a byte of weights is downloaded: from config.json and headers.

    Recipe + GPUs (this machine's, or imagined ones) -> estimate_fit() -> Fit -> say_fit(), require_fit()

The figures are those of tasks/train/needs.py and plan.py, by which training itself is planned and refused; here they
are only told part by part, with the changes that would make a recipe fit.

Ring: edge (Hub, disk, /proc, nvidia-smi).  Units: bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from huggingface_hub import HfApi

from tasks.check.base import BaseFacts, look_at_base
from tasks.errors import CapacityError, SpecError
from tasks.machine import Gpu, available_memory_bytes
from tasks.models import require_mxfp4
from tasks.specs import PretrainSpec, Recipe, TrainSpec, change
from tasks.targets import find_targets, first_trained_layer
from tasks.train.needs import choose_attention, require_aligned, require_quantizable
from tasks.train.plan import StepPlan, Workload, plan_step, say_plan
from tasks.train.run import checkpoint_bytes, host_room, launched_spec, require_warm, training_gpus
from tasks.train.weights import is_expert, require_offloadable

_LEAST_ROW_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A planned training beside the memory that it would run in: of one GPU, or without any of the host."""

    base: BaseFacts
    recipe: Recipe
    work: Workload
    plan: StepPlan
    gpus: list[Gpu]
    room_bytes: int
    host_room_bytes: int | None  # of a machine with these GPUs; None: not known

    @property
    def needs(self) -> dict[str, int]:
        """What one GPU holds at the peak of a step, by part."""
        return self.work.needs(self.plan)

    @property
    def needed_bytes(self) -> int:
        """The parts together."""
        return sum(self.needs.values())

    @property
    def fits(self) -> bool:
        """Whether they are there, by the rule by which a training is refused."""
        return self.needed_bytes <= self.room_bytes


def estimate_fit(
    recipe: Recipe, pretraining: PretrainSpec | None, hub: HfApi, gpus: list[Gpu], host_room_bytes: int | None = None
) -> Fit:
    """Plan the recipe's training on these GPUs, one process each; without any on this machine's host.

    Args:
        recipe: what is trained.
        pretraining: of a base that is made here.
        hub: where the base is.
        gpus: real or imagined ones.
        host_room_bytes: as for `plan_step`.
    Raises: SpecError (a target hits nothing, a row longer than the context, a base that can't be trained),
        MissingError, AccessError, TransientError (the Hub), as look_at_base.
    """
    base = look_at_base(recipe.base, pretraining, hub)
    _require_trainable(recipe, base, on_gpu=bool(gpus))
    targets = find_targets(base.shapes, recipe.train.lora)
    require_offloadable(base.config, recipe.train, targets)
    work = Workload(
        shapes=base.shapes,
        config=base.config,
        spec=recipe.train,
        targets=targets,
        row_tokens=recipe.pack.row_tokens,
    )
    free = min((gpu.free_bytes for gpu in gpus), default=None)
    room = available_memory_bytes() if free is None else free
    plan = plan_step(work, free, host_room_bytes)  # without a GPU nothing is chosen, as in training
    return Fit(
        base=base, recipe=recipe, work=work, plan=plan, gpus=gpus, room_bytes=room, host_room_bytes=host_room_bytes
    )


def find_gpus(recipe: Recipe) -> list[Gpu]:
    """Return the GPUs that a recipe would train on: this machine's, or those of the nodes that its launch names."""
    return training_gpus(recipe.train)


def find_host_room(recipe: Recipe) -> int | None:
    """Return what the host of these GPUs has free; None where its launch trains elsewhere."""
    return host_room(recipe.train)


def launched(recipe: Recipe) -> Recipe:
    """Return the recipe on the number of processes that its launch starts. Raises SpecError when they can't share."""
    return recipe.model_copy(update={"train": launched_spec(recipe.train)})


def say_fit(fit: Fit, name: str) -> str:
    """Write the estimate part by part, and yes or no with what would make it fit."""
    base, work = fit.base, fit.work
    where = f"{len(fit.gpus)} x {fit.gpus[0].name}" if fit.gpus else "no GPU: the host's memory"
    memory = "GPU" if fit.gpus else "host"
    parts = [f"{memory:<10} {part} {_gb(size)}" for part, size in fit.needs.items() if size]
    weights = sum(map(prod, work.shapes.values()))
    each = 4 if fit.recipe.merge.dtype == "float32" else 2
    packs = fit.recipe.merge.experts == "mxfp4"
    merged = round(sum(prod(s) * (17 / 32 if packs and is_expert(n, s) else each) for n, s in work.shapes.items()))
    disk = [
        f"download {_gb(base.download_bytes)}" if base.download_bytes else "nothing to download",
        f"checkpoints {_gb(checkpoint_bytes(work.num_trainable, work.spec))}",
        f"merged model {_gb(merged)} (not for an adapter alone)",
    ]
    resting = fit.plan.num_offloaded
    copies = work.host_bytes(fit.plan) if fit.gpus else 0
    why = (
        f"{resting} layers that rest there, loading included"
        if resting
        else f"loading the base, in {work.spec.num_processes} copies"
    )
    why += f", and the gate of {fit.plan.num_shelved} layers" if fit.plan.num_shelved else ""
    lines = [
        f"{name} on {where}, {_gb(fit.room_bytes)} free",
        f"base       {base.origin}: {weights / 1e9:.1f} billion parameters as {_stored_as(base, work.spec)}",
        f"adapter    {len(work.targets)} weights, {work.num_trainable:,} trainable",
        f"step       {say_plan(work, fit.plan).partition(': about')[0]}",
        *parts,
        f"{memory:<10} = {_gb(fit.needed_bytes)} of {_gb(fit.room_bytes)}",
        *([f"host       {_gb(copies)} for {why}"] if copies else []),
        f"disk       {', '.join(disk)}",
        f"fits: {'yes' if fit.fits else 'no'}",
    ]
    return "\n".join([*lines, *([] if fit.fits else say_ways_out(fit))])


def require_fit(fit: Fit, name: str) -> None:
    """Raise CapacityError, with the whole estimate and the ways out, when it does not fit."""
    if not fit.fits:
        raise CapacityError(say_fit(fit, name))


def say_ways_out(fit: Fit) -> list[str]:
    """Return each change that was tried and fits, by the same estimate; else how large a GPU would have to be."""
    where = "" if fit.gpus else " on a machine with a GPU"
    said = []
    for changes, recipe, count in _candidates(fit):
        work = replace(fit.work, spec=recipe.train, row_tokens=recipe.pack.row_tokens)
        plan = plan_step(work, fit.room_bytes, fit.host_room_bytes)
        needed = sum(work.needs(plan).values())
        if needed <= fit.room_bytes:
            gpus = f" on {count} such GPUs" if count > 1 else where
            copies = work.host_bytes(plan)
            host = f", and {_gb(copies)} of host memory" if copies else ""
            said.append(f"would fit{gpus} with {changes}: {_gb(needed)}{host}")
    if said:
        return said
    return [
        "nothing that was tried fits (nf4, layers on the host, half the row, 2 to 8 GPUs with fsdp2): it takes "
        f"{_gb(fit.needed_bytes)} in one GPU, a smaller base, or an adapter on the last layers only, below which "
        "train.offload_layers = -1 lets all rest in the host's memory"
    ]


def imagine_gpus(gb: float, count: int) -> list[Gpu]:
    """Return GPUs that are not here: `gb` GB (10^9 bytes) free each. A "16 GB" card has 16.1 of them or more."""
    return [Gpu(name=f"{gb:g} GB GPU", total_bytes=int(gb * 1e9), free_bytes=int(gb * 1e9))] * count


def _require_trainable(recipe: Recipe, base: BaseFacts, *, on_gpu: bool) -> None:
    if recipe.train.max_steps > 0:  # by epochs only the packed rows tell
        require_warm(0, recipe.train)
    require_aligned(base.config, recipe.train)
    require_quantizable(base.config, recipe.train)
    if stored := base.config.get("quantization_config"):
        require_mxfp4(stored)
    choose_attention(base.config.get("model_type", ""), recipe.train, on_gpu=on_gpu)
    if base.context_tokens and recipe.pack.row_tokens > base.context_tokens:
        raise SpecError(
            f"PackSpec.row_tokens = {recipe.pack.row_tokens} but the base's context is {base.context_tokens} tokens: "
            "lower row_tokens (MAX_SEQ_LENGTH)"
        )


def _candidates(fit: Fit) -> Iterator[tuple[str, Recipe, int]]:
    """Yield (the changes in words, the recipe, GPUs) of what may fit where the recipe does not."""
    train, row = fit.recipe.train, fit.recipe.pack.row_tokens
    is_stored_small = bool(fit.base.config.get("quantization_config"))
    if train.quantization == "none" and train.parallel == "ddp" and not is_stored_small:
        yield "train.quantization = nf4", change(fit.recipe, {"train": {"quantization": "nf4"}}), len(fit.gpus)
    if fit.gpus and first_trained_layer(fit.work.targets) and train.num_processes == 1 and train.quantization != "int8":
        rest: dict[str, Any] = {"offload_layers": -1}
        yield "train.offload_layers = -1", change(fit.recipe, {"train": rest}), 1
        if train.quantization == "none" and not is_stored_small:
            small = {**rest, "quantization": "nf4"}
            yield "train.quantization = nf4, offload_layers = -1", change(fit.recipe, {"train": small}), 1
    for shorter in (row // 2, row // 4):
        if shorter >= _LEAST_ROW_TOKENS:
            changes: dict[str, Any] = {"pack": {"row_tokens": shorter}, "train": {"rows_per_device": 1}}
            yield f"pack.row_tokens = {shorter}, train.rows_per_device = 1", change(fit.recipe, changes), len(fit.gpus)
    for count in (2, 4, 8) if train.quantization == "none" and fit.gpus else ():
        if count > train.num_processes:
            shared = {"num_processes": count, "parallel": "fsdp2"}
            yield f"train.num_processes = {count}, parallel = fsdp2", change(fit.recipe, {"train": shared}), count


def _stored_as(base: BaseFacts, spec: TrainSpec) -> str:
    """Say what the weights are in while they train: bitsandbytes makes Linear layers small, never 3-D experts."""
    if spec.quantization == "none":
        return spec.dtype + (", unpacked from MXFP4" if base.config.get("quantization_config") else "")
    has_experts = any(is_expert(name, size) for name, size in base.shapes.items())
    return f"{spec.quantization}, {'experts, ' if has_experts else ''}embeddings and head in {spec.dtype}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
