"""Run a batch that was planned for some number of processes on another number: the same rows in each step.

    TrainSpec (planned) + processes that there are -> fit_processes() -> TrainSpec (as it runs)

The planned spec stays the artifact's key, so a run goes on from its checkpoint on a machine with more or fewer GPUs.
Each step learns the same rows; only the order in which their gradients are added differs (rounding), and dropout draws
other numbers. Trap: the last step of an epoch that its rows do not fill. accelerate gives each process as many rows, so
with more processes a few of the epoch's first rows come again there.

Ring: pure.
"""

from tasks.errors import SpecError
from tasks.specs import TrainSpec


def fit_processes(spec: TrainSpec, available: int) -> TrainSpec:
    """Return the spec for at most `available` processes, its global batch kept by accumulation.

    The largest number that divides the batches of a step is taken; a launch on several machines has its own number,
    which has to.  Raises: SpecError when there is none.

    >>> from tasks.specs import LoraSpec
    >>> planned = TrainSpec(lora=LoraSpec(target_modules=("q_proj",)), num_processes=4, gradient_accumulation=3)
    >>> fitted = fit_processes(planned, 2)
    >>> fitted.num_processes, fitted.gradient_accumulation
    (2, 6)
    """
    if spec.launch.launcher != "local":
        available = spec.launch.num_processes
    if available < 1:
        raise SpecError(f"{available} processes can't train: expected 1 or more")
    batches = spec.num_processes * spec.gradient_accumulation
    fitting = max(count for count in range(1, min(available, batches) + 1) if batches % count == 0)
    if spec.launch.launcher != "local" and fitting != available:  # on one machine some may stay idle; a launch can't
        counts = ", ".join(str(count) for count in range(1, batches + 1) if batches % count == 0)
        raise SpecError(
            f"TrainSpec.launch starts {available} processes, but a step has {batches} batches (num_processes "
            f"{spec.num_processes} x gradient_accumulation {spec.gradient_accumulation}), which that many can't share "
            f"equally: start one of {counts}, or change gradient_accumulation"
        )
    parallel = spec.parallel if fitting > 1 else "ddp"  # one process has nobody to share the base with
    return spec.model_copy(
        update={"num_processes": fitting, "gradient_accumulation": batches // fitting, "parallel": parallel}
    )
