"""Start and watch the trainer process; turn its end into an artifact or an error.

    PackedDataset + BaseCheckpoint + TrainSpec -> tasks.train.worker -> adapter/

Ring: edge. Imports no torch.
"""

from pathlib import Path

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    PackedDataset,
    TrainedAdapter,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.errors import MissingError, SpecError
from tasks.gptoss.layout import parameter_name, quantized_stem
from tasks.specs import LoraSpec, TrainSpec
from tasks.train.targets import Shapes, Target, find_targets
from tasks.trainer_job import ProgressFn, run_trainer

VERSION = 1


def train_adapter(
    packed: PackedDataset, base: BaseCheckpoint, spec: TrainSpec, store: ArtifactStore, on_progress: ProgressFn
) -> TrainedAdapter:
    """Train an adapter, resuming what an earlier try left; a second call returns the finished one.

    Raises: SpecError (a target hits nothing), CapacityError, OutOfMemoryError, TrainingError.
    """
    key = make_key("train", VERSION, spec, {}, (packed, base))
    with store.claim(TrainedAdapter, key) as claim:
        if claim.found:
            return claim.found
        targets = plan_targets(base, spec.lora)
        _require_room(base, targets, spec, claim.folder)
        result = run_trainer(
            "tasks.train.worker",
            claim.folder,
            {
                "folder": str(claim.folder),
                "spec": spec.model_dump(mode="json"),
                "base_folder": base.model_folder,
                "packed_folder": packed.folder,
                "row_tokens": packed.row_tokens,
            },
            num_processes=spec.num_processes,
            stall_timeout_s=spec.stall_timeout_s,
            on_progress=on_progress,
        )
        adapter_folder = claim.folder / "adapter"
        artifact = TrainedAdapter(
            key=key,
            folder=str(claim.folder),
            parents=(packed.ref, base.ref),
            adapter_folder=str(adapter_folder),
            adapter_digest=folder_digest(digest_files(adapter_folder)),
            base_folder=base.model_folder,
            base_digest=base.model_digest,
            **result,
        )
        return claim.commit(artifact, spec=spec)


def find_adapter(name: str, store: ArtifactStore) -> TrainedAdapter:
    """Return the trained adapter whose key begins with `name`, or the newest for `latest`.

    Raises: MissingError listing what exists, SpecError when several fit.
    """
    adapters = store.committed(TrainedAdapter)
    fitting = adapters[-1:] if name == "latest" else [a for a in adapters if a.key.startswith(name)]
    known = ", ".join(adapter.short for adapter in adapters) or "none"
    if not fitting or not name:
        raise MissingError(f"there is no adapter {name!r} below {store.root}; there are: {known}")
    if len(fitting) > 1:
        raise SpecError(f"adapter {name!r} fits {len(fitting)} of: {known}; give more digits")
    return fitting[0]


def base_shapes(model_folder: Path) -> Shapes:
    """Return parameter name -> shape as the loaded model will have it, from safetensors headers alone."""
    shapes: Shapes = {}
    for shard in sorted(model_folder.glob("*.safetensors")):
        for stored, entry in files.read_safetensors_header(shard)[0].items():
            name = parameter_name(stored)
            if name is None:
                continue
            shape = tuple(entry["shape"])
            if quantized_stem(stored):  # (E, O, I/32, 16) blocks are the transposed (E, I, O) parameter
                shape = (shape[0], shape[2] * 32, shape[1])
            shapes[name] = shape
    return shapes


def plan_targets(base: BaseCheckpoint, lora: LoraSpec) -> list[Target]:
    """Return what the adapter will be put on. Raises SpecError when a target hits nothing."""
    return find_targets(base_shapes(Path(base.model_folder)), lora)


def _require_room(base: BaseCheckpoint, targets: list[Target], spec: TrainSpec, folder: Path) -> None:
    """A checkpoint holds the adapter and two moments in fp32; the host holds the base while it loads."""
    num_trainable = sum(target.num_trainable for target in targets)
    files.require_disk(folder, (spec.keep_checkpoints + 2) * 12 * num_trainable + (64 << 20), "training")
    if not Path("/dev/nvidia0").exists():
        weight_bytes = 4 if spec.dtype == "float32" else 2
        needed = weight_bytes * base.num_parameters + 16 * num_trainable + (1 << 30)
        files.require_memory(needed, "training on the CPU", "use a smaller base, or a machine with a GPU")
