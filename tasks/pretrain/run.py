"""Train a gpt-oss from scratch on plain text, in a process of its own.

    corpus + shape -> tokenizer (rebuilt offline) -> tasks.pretrain.worker -> model/

Ring: edge.
"""

import shutil
from math import prod
from pathlib import Path

from tasks import files, machine
from tasks.artifacts import CHECKPOINTS, ArtifactStore, PretrainedModel, digest_files, folder_digest, make_key
from tasks.errors import DataError, MissingError, SpecError
from tasks.gptoss.layout import parameter_shapes
from tasks.gptoss.tokenizer import NUM_IDS, shared_tokenizer
from tasks.specs import PretrainSpec
from tasks.trainer_job import ProgressFn, Terms, run_trainer

VERSION = 1
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "ja_culture" / "corpus.txt"


def pretrain_model(spec: PretrainSpec, store: ArtifactStore, on_progress: ProgressFn) -> PretrainedModel:
    """Train a GptOssForCausalLM from its config; a second call returns the finished one.

    Raises: MissingError or DataError (corpus), CapacityError, TrainingError.
    """
    corpus, key = _find_corpus(spec), pretrain_key(spec)
    with store.claim(PretrainedModel, key) as claim:
        if claim.found:
            return claim.found
        _require_room(spec, claim.folder)
        tokenizer_folder = shared_tokenizer(store.root)
        result = run_trainer(
            "tasks.pretrain.worker",
            claim.folder,
            {
                "folder": str(claim.folder),
                "spec": spec.model_dump(mode="json"),
                "corpus": str(corpus.resolve()),
                "tokenizer_folder": str(tokenizer_folder),
            },
            Terms(),
            on_progress,
        )
        model_folder = claim.folder / "model"
        artifact = PretrainedModel(
            key=key,
            folder=str(claim.folder),
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


def pretrain_key(spec: PretrainSpec) -> str:
    """Return the key of the model that `spec` makes. Raises SpecError, MissingError or DataError (corpus)."""
    return make_key("pretrain", VERSION, spec, {"corpus": files.digest(_find_corpus(spec))})


def pretrained_origin(key: str) -> str:
    """Return what a base that was made here is called."""
    return f"pretrained {key[:8]}"


def _find_corpus(spec: PretrainSpec) -> Path:
    if spec.shape.vocab_size < NUM_IDS:
        raise SpecError(
            f"GptOssShape.vocab_size = {spec.shape.vocab_size} but the gpt-oss tokenizer has {NUM_IDS} ids, which "
            "vLLM's harmony path is wired to: leave it out"
        )
    corpus = SHIPPED if spec.corpus == "shipped" else Path(spec.corpus).expanduser()
    if not corpus.is_file():
        raise MissingError(f"corpus {corpus} is not there: check PretrainSpec.corpus")
    if corpus.stat().st_size < 4 * spec.row_tokens:
        raise DataError(
            f"corpus {corpus} has {corpus.stat().st_size} bytes, less than a row of {spec.row_tokens} tokens"
        )
    return corpus


def _require_room(spec: PretrainSpec, folder: Path) -> None:
    """AdamW in fp32 holds weight, gradient and two moments: 16 bytes a parameter; a checkpoint holds 12."""
    num_parameters = sum(prod(size) for size in parameter_shapes(spec.shape).values())
    files.require_disk(folder, 2 * 12 * num_parameters, "pretraining")
    machine.require_memory(16 * num_parameters + (1 << 30), "pretraining", "lower the shape or use a larger machine")
