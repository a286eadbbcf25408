"""Train a gpt-oss from scratch on a tokenised corpus, in a process of its own.

    corpus + shape -> tasks.pretrain.worker -> model/

Ring: edge.
"""

import shutil
from math import prod
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
from tasks.gptoss.layout import parameter_shapes
from tasks.specs import PretrainSpec
from tasks.trainer_job import ProgressFn, Terms, run_trainer

VERSION = 1


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
            Terms(),
            on_progress,
        )
        model_folder = claim.folder / "model"
        artifact = PretrainedModel(
            key=key,
            folder=str(claim.folder),
            parents=(corpus.ref,),
            model_folder=str(model_folder),
            origin=pretrained_origin(key),
            model_digest=folder_digest(digest_files(model_folder)),
            num_parameters=result["num_parameters"],
            num_steps=spec.num_steps,
            first_loss=result["first_loss"],
            last_loss=result["last_loss"],
        )
        claim.commit(
            artifact,
            spec=spec,
            about={"num_corpus_tokens": result["num_corpus_tokens"], "stamp": files.stamp(model_folder)},
        )
        shutil.rmtree(claim.folder / CHECKPOINTS, ignore_errors=True)
        return artifact


def pretrain_key(spec: PretrainSpec, pins: dict[str, str]) -> str:
    """Return the key of the model that `spec` makes of the corpus and tokenizer that `pins` name.

    Known before the corpus is tokenised: a base that is not made yet is named by it.
    """
    return make_key("pretrain", VERSION, spec, pins)


def pretrained_origin(key: str) -> str:
    """Return what a base that was made here is called."""
    return f"pretrained {key[:8]}"


def _require_room(spec: PretrainSpec, folder: Path) -> None:
    """AdamW in fp32 holds weight, gradient and two moments: 16 bytes a parameter; a checkpoint holds 12."""
    num_parameters = sum(prod(size) for size in parameter_shapes(spec.shape).values())
    files.require_disk(folder, 2 * 12 * num_parameters, "pretraining")
    machine.require_memory(16 * num_parameters + (1 << 30), "pretraining", "lower the shape or use a larger machine")
