"""How a step is cut into passes: rows of one pass, and what is recomputed in it, so that it fits and is fast.

    needs + room -> plan_step() -> StepPlan;  after an out of memory: smaller_plan()

The rows of an optimizer step never change, only how many of them pass at once: the run stays the same
run, up to rounding.

Ring: pure.  Units: bytes, tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tasks.costs import layer_weights, say_needs
from tasks.errors import SpecError
from tasks.specs import TrainSpec
from tasks.targets import Shapes, Target, first_trained_layer
from tasks.train.needs import host_bytes, shelf_bytes, training_needs, uses_fused_kernels
from tasks.train.weights import Config, resting_bytes

_RESERVE_BYTES = 1 << 30  # CUDA's context and the allocator's slack, which no tensor shows
_PASSAGE_FLOPS = 8000  # arithmetic of a GPU while a byte comes from the host: 350e12 a second beside 45 GB (H200)
_PASS_TOKENS = 850  # what starting a pass costs, in tokens: 31 ms of 36.5 ms per 1,000 tokens (H200, gpt-oss-20b)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: `gradient_accumulation` passes of `rows_per_device` rows."""

    rows_per_device: int
    gradient_accumulation: int
    checkpointing: str  # none, offload, selective or full
    num_recomputed: int = 0  # selective: layers whose gate is recomputed
    num_offloaded: int = 0  # lowest layers that rest in the host's memory
    num_shelved: int = 0  # offload: layers whose gate rests there between the two halves of a pass

    @property
    def num_rows(self) -> int:
        """Rows of one process in a step."""
        return self.rows_per_device * self.gradient_accumulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained on what: everything that memory and time depend on, beside the plan."""

    shapes: Shapes
    config: Config
    spec: TrainSpec
    targets: list[Target]
    row_tokens: int
    document_tokens: float = 0.0  # mean length, once it is known
    num_steps: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of one process in a step; a plan may cut them as it likes."""
        return self.spec.rows_per_device * self.spec.gradient_accumulation

    @property
    def num_trainable(self) -> int:
        """Trainable parameters."""
        return sum(target.num_trainable for target in self.targets)

    def needs(self, plan: StepPlan) -> dict[str, int]:
        """Return what one GPU holds at the peak of a step under `plan`, by part."""
        tokens = self.row_tokens * plan.rows_per_device
        return training_needs(
            self.shapes,
            self.config,
            self.spec,
            self.targets,
            tokens,
            plan.checkpointing,
            plan.num_recomputed,
            plan.num_offloaded,
            plan.num_shelved,
        )

    def host_bytes(self, plan: StepPlan) -> int:
        """Return what `plan` takes of the host's memory beside its GPUs."""
        gates = shelf_bytes(self.config, self.spec, self.row_tokens * plan.rows_per_device, plan.num_shelved)
        return gates + host_bytes(self.shapes, self.config, self.spec, plan.num_offloaded)

    def cost(self, plan: StepPlan) -> float:
        """Return the time of a step in arbitrary units: forward, backward without weight gradients, recomputation."""
        num_layers = max(1, self.config.get("num_hidden_layers", 1))
        again = (plan.checkpointing == "full") + (0.4 * plan.num_recomputed + 0.01 * plan.num_shelved) / num_layers
        tokens = plan.rows_per_device * self.row_tokens
        coming = sum(resting_bytes(self.shapes, self.config, self.spec, plan.num_offloaded))
        coming_tokens = coming * _PASSAGE_FLOPS / (4 * num_layers * layer_weights(self.config)) if coming else 0.0
        return plan.gradient_accumulation * (tokens * (2 + again) / 2 + _PASS_TOKENS + coming_tokens)


def plan_step(work: Workload, room_bytes: int | None, host_room_bytes: int | None = None) -> StepPlan:
    """Return the fastest plan whose needs fit `room_bytes`, or the smallest one when none does.

    Without a GPU (`room_bytes` None) nothing is chosen: the spec's own rows, nothing recomputed unless it says so.
    No gate is sent to a host that has no room for it; None: what the host has is not known.

    Raises: SpecError for a way to save memory that only our kernels have.
    """
    plans = list(_candidates(work, choose=room_bytes is not None))
    if room_bytes is None:
        return plans[0]
    fitting = [
        plan
        for plan in plans
        if sum(work.needs(plan).values()) + _RESERVE_BYTES <= room_bytes and _has_shelf(work, plan, host_room_bytes)
    ]
    if fitting:
        return min(fitting, key=work.cost)
    return min(plans, key=lambda plan: sum(work.needs(plan).values()))


def smaller_plan(work: Workload, plan: StepPlan, host_room_bytes: int | None = None) -> StepPlan | None:
    """Return what to try after `plan` ran out of memory: half the rows of a pass, then more recomputation.

    `host_room_bytes` as for `plan_step`.
    """
    if plan.rows_per_device > 1:
        rows = next(n for n in range(plan.rows_per_device // 2, 0, -1) if plan.rows_per_device % n == 0)
        return replace(
            plan,
            rows_per_device=rows,
            gradient_accumulation=plan.gradient_accumulation * plan.rows_per_device // rows,
        )
    needed = sum(work.needs(plan).values())
    others = [
        replace(plan, checkpointing=mode, num_recomputed=recomputed, num_shelved=shelved, num_offloaded=resting)
        for mode, recomputed, shelved in _modes(work)
        for resting in _offloads(work)
    ]
    lighter = [
        other
        for other in others
        if sum(work.needs(other).values()) < needed and _has_shelf(work, other, host_room_bytes)
    ]
    return min(lighter, key=work.cost, default=None)


def say_plan(work: Workload, plan: StepPlan) -> str:
    """Write the plan in a line, with what it needs."""
    recomputed = {"full": "every layer", "selective": f"the gate of {plan.num_recomputed} layers"}.get(
        plan.checkpointing, "nothing"
    )
    shelved = f", the gate of {plan.num_shelved} layers sent to the host and back" if plan.num_shelved else ""
    resting = f", {plan.num_offloaded} layers resting on the host" if plan.num_offloaded else ""
    return (
        f"{plan.gradient_accumulation} passes of {plan.rows_per_device} x {work.row_tokens} tokens a step, "
        f"{recomputed} recomputed{shelved}{resting}: about {say_needs(work.needs(plan))}"
    )


def _has_shelf(work: Workload, plan: StepPlan, host_room_bytes: int | None) -> bool:
    """Say whether the host holds the gates that `plan` sends there, beside what else it takes."""
    is_asked = host_room_bytes is not None and plan.num_shelved > 0
    return not is_asked or work.host_bytes(plan) // work.spec.launch.nodes <= (host_room_bytes or 0)


def _candidates(work: Workload, *, choose: bool) -> Iterator[StepPlan]:
    spec = work.spec
    total = work.num_rows
    rows = [spec.rows_per_device]
    if choose and spec.fit_micro_batch:
        rows = [count for count in range(total, 0, -1) if total % count == 0]
    modes, offloads = list(_modes(work)), list(_offloads(work))
    for count in rows:
        for mode, recomputed, shelved in modes if choose else modes[:1]:
            for resting in offloads if choose else [0]:
                yield StepPlan(
                    rows_per_device=count,
                    gradient_accumulation=total // count,
                    checkpointing=mode,
                    num_recomputed=recomputed,
                    num_offloaded=resting,
                    num_shelved=shelved,
                )


def _offloads(work: Workload) -> list[int]:
    """Return how many layers may rest on the host: what the spec says, or with -1 each eighth of those that can."""
    if work.spec.offload_layers >= 0:
        return [work.spec.offload_layers]
    lowest = first_trained_layer(work.targets)
    return sorted({round(lowest * eighths / 8) for eighths in range(9)})


def _modes(work: Workload) -> Iterator[tuple[str, int, int]]:
    """Yield the ways to save memory that the spec allows, the fastest first: mode, layers recomputed, layers shelved.

    Half of the gates at most go to the host: more of them the bus can't carry while the layers compute.
    """
    wanted, num_layers = work.spec.checkpointing, work.config.get("num_hidden_layers", 0)
    is_fused = uses_fused_kernels(work.config, work.spec)
    if wanted in ("offload", "selective") and not is_fused:
        raise SpecError(
            f"TrainSpec.checkpointing = {wanted!r} is of our experts only, but the base is "
            f"{work.config.get('model_type')} and kernels are {work.spec.kernels}: set full, none or auto"
        )
    if wanted in ("auto", "none"):
        yield "none", 0, 0
    if wanted == "offload" or (wanted == "auto" and is_fused and work.spec.parallel == "ddp"):
        half = max(1, (num_layers - first_trained_layer(work.targets)) // 2)
        yield from (("offload", 0, count) for count in ((half // 2, half) if wanted == "auto" else (half,)) if count)
    if wanted in ("auto", "selective") and is_fused:
        quarters = [round(num_layers * share / 4) for share in (1, 2, 3, 4)]
        yield from (("selective", layers, 0) for layers in (quarters if wanted == "auto" else quarters[-1:]))
    if wanted in ("auto", "full"):
        yield "full", 0, 0
