"""Train a gpt-oss from scratch on a tokenised corpus, in a process of its own.

    corpus + shape -> tasks.pretrain.worker -> model/

Ring: edge.
"""

import logging
from pathlib import Path

from tasks import files, machine
from tasks.artifacts import (
    CHECKPOINTS,
    ArtifactStore,
    PretrainedModel,
    TokenizedCorpus,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.costs import say_needs
from tasks.errors import CapacityError
from tasks.pretrain.plan import choose_attention, pretraining_needs
from tasks.processes import find_alive
from tasks.specs import PretrainSpec
from tasks.trainer_job import ProgressFn, Terms, run_trainer

VERSION = 1
logger = logging.getLogger(__name__)


def pretrain_model(
    spec: PretrainSpec, corpus: TokenizedCorpus, store: ArtifactStore, on_progress: ProgressFn
) -> PretrainedModel:
    """Train a GptOssForCausalLM from its config; a second call returns the finished one.

    Raises: CapacityError, TrainingError.
    """
    key = pretrain_key(spec, corpus.pins)
    with store.claim(PretrainedModel, key) as claim:
        if claim.found:
            return claim.found
        if not _goes_on_by_itself(claim.folder):
            _require_room(spec, claim.folder)
        result = run_trainer(
            "tasks.pretrain.worker",
            claim.folder,
            {
                "folder": str(claim.folder),
                "spec": spec.model_dump(mode="json"),
                "corpus_folder": corpus.folder,
                "corpus": corpus.model_dump(mode="json", include={"dtype", "num_tokens", "num_documents"}),
            },
            Terms(num_processes=spec.num_processes),
            on_progress,
        )
        model_folder = claim.folder / "model"
        digests = digest_files(model_folder)
        artifact = PretrainedModel(
            key=key,
            folder=str(claim.folder),
            parents=(corpus.ref,),
            model_folder=str(model_folder),
            origin=pretrained_origin(key),
            model_digest=folder_digest(digests),
            num_parameters=result["num_parameters"],
            num_steps=spec.num_steps,
            first_loss=result["first_loss"],
            last_loss=result["last_loss"],
            validation_loss=result.get("validation_loss"),
        )
        return claim.commit(
            artifact,
            spec=spec,
            about={
                "num_corpus_tokens": corpus.num_tokens,
                "memory": result["memory"],
                "digests": digests,
                "stamp": files.stamp(model_folder),
            },
        )


def check_pretraining(spec: PretrainSpec, pins: dict[str, str], store: ArtifactStore, *, has_gpu: bool) -> str:
    """Say what the training takes, before its corpus is tokenised; "" for a model that is there or being made.

    Raises: SpecError (kernels that there are none of), CapacityError.
    """
    choose_attention(spec, on_gpu=has_gpu)
    key = pretrain_key(spec, pins)
    folder = store.folder(PretrainedModel, key)
    if store.record(PretrainedModel, key) or _goes_on_by_itself(folder):
        return ""
    _require_room(spec, folder)
    return f"pretraining takes about {say_needs(pretraining_needs(spec))} in each process"


def pretrain_key(spec: PretrainSpec, pins: dict[str, str]) -> str:
    """Return the key of the model that `spec` makes of the corpus and tokenizer that `pins` name.

    Known before the corpus is tokenised: a base that is not made yet is named by it.
    """
    if spec.dtype == "bfloat16":
        pins = {**pins, "masters": "split"}  # before there were any, the same knobs made another model
    return make_key("pretrain", VERSION, spec, pins)


def pretrained_origin(key: str) -> str:
    """Return what a base that was made here is called."""
    return f"pretrained {key[:8]}"


def _goes_on_by_itself(folder: Path) -> bool:
    """Say whether a trainer is through, or runs on after its parent was killed: what it holds is not to be free."""
    return (folder / "result.json").exists() or find_alive(folder / "process.json") is not None


def _require_room(spec: PretrainSpec, folder: Path) -> None:
    """Raise CapacityError when disk, GPUs or memory are too small; a checkpoint holds weights and moments."""
    needs = pretraining_needs(spec)
    parts = spec.num_processes if spec.parallel == "fsdp2" else 1
    held = sum(files.list_files(folder / CHECKPOINTS).values())  # a run that goes on: they are dropped for newer ones
    kept = parts * sum(needs[part] for part in ("weights", "optimizer", "masters"))
    files.require_disk(folder, 3 * kept - held, "pretraining")
    gpus, needed = machine.list_gpus(), sum(needs.values())
    way_out = "lower rows_per_device (the step's rows stay), choose optimizer='adamw_8bit' or checkpointing='selective'"
    if not gpus:
        machine.require_memory(spec.num_processes * needed + (1 << 30), "pretraining", f"{way_out}, or use a GPU")
        return
    if len(gpus) < spec.num_processes:
        raise CapacityError(
            f"PretrainSpec.num_processes = {spec.num_processes} but this machine has {len(gpus)} GPUs: lower it; a run "
            "that was begun goes on with fewer"
        )
    tightest = min(gpus[: spec.num_processes], key=lambda gpu: gpu.free_bytes)
    if needed > tightest.free_bytes:
        raise CapacityError(
            f"pretraining takes about {say_needs(needs)} of GPU memory but {tightest.free_bytes / 1e9:.1f} of "
            f"{tightest.total_bytes / 1e9:.1f} GB of the {tightest.name} are free: {way_out}, or more GPUs with "
            "parallel='fsdp2'"
        )
    logger.info("pretraining takes about %s of GPU memory", say_needs(needs))
