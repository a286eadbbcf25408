"""What can be known of a base before it is downloaded or made: names, shapes, context, size, tokenizer.

    Hub id -> config.json + the headers of its safetensors files (kilobytes) -> BaseFacts

Ring: edge (disk, Hub).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError

from tasks import files
from tasks.artifacts import Artifact, ArtifactStore, BaseCheckpoint, FetchedDataset, PackedDataset, TrainedAdapter
from tasks.corpus.run import pin_inputs, prepare_corpus
from tasks.errors import MissingError, SpecError
from tasks.fetch.run import check_model_folder, download_bytes, local_folder
from tasks.gptoss.layout import MODEL_TYPE, config_values, parameter_shapes
from tasks.gptoss.tokenizer import shared_tokenizer
from tasks.hub import hub_errors, pin_commit
from tasks.model_config import complete_config
from tasks.models import base_shapes
from tasks.pretrain.run import pretrain_key, pretrained_origin
from tasks.specs import BaseModelSpec, PretrainSpec, Recipe, Spec, validate
from tasks.targets import Shapes, loaded_shapes

_TOKENIZER_FILES = [
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "config.json",
]

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """A base that may not be here yet. `origin` is the one that its artifact will carry."""

    origin: str
    shapes: Shapes
    config: dict[str, Any]  # Any: config.json
    download_bytes: int = 0

    @property
    def context_tokens(self) -> int:
        """Longest row that the model takes; 0 when its config does not say."""
        return self.config.get("max_position_embeddings") or 0


def look_at_base(spec: BaseModelSpec, pretraining: PretrainSpec | None, hub: HfApi) -> BaseFacts:
    """Collect the facts without any weights. Raises MissingError, CorruptError, AccessError, TransientError."""
    local = local_folder(spec)
    if pretraining is not None:
        shape = pretraining.shape
        return BaseFacts(
            origin=pretrained_origin(pretrain_key(pretraining, pin_inputs(pretraining, hub))),
            shapes=parameter_shapes(shape),
            config={"model_type": MODEL_TYPE, **config_values(shape)},
        )
    if local is not None:
        config = files.read_json(check_model_folder(local) / "config.json")
        shapes = base_shapes(local)
        return BaseFacts(origin=str(local), shapes=shapes, config=complete_config(config, shapes))
    commit = pin_commit(hub, spec.model, spec.revision, "model")
    doing = f"base model {spec.model}@{commit[:8]}"
    with hub_errors(doing):
        try:
            headers = hub.get_safetensors_metadata(spec.model, revision=commit).files_metadata.values()
        except NotASafetensorsRepoError as error:
            raise MissingError(f"{doing} has no .safetensors weights: name a model that has, or convert it") from error
        config = files.read_json(Path(hub.hf_hub_download(spec.model, "config.json", revision=commit)))
    stored = {name: tuple(tensor.shape) for header in headers for name, tensor in header.tensors.items()}
    shapes = loaded_shapes(stored)
    return BaseFacts(
        origin=f"{spec.model}@{commit}",
        shapes=shapes,
        config=complete_config(config, shapes),
        download_bytes=download_bytes(spec.model, commit, hub),
    )


def find_origin(spec: BaseModelSpec, pretraining: PretrainSpec | None, hub: HfApi) -> str:
    """Return the origin that the base's artifact has or will have."""
    if pretraining is not None:
        return pretrained_origin(pretrain_key(pretraining, pin_inputs(pretraining, hub)))
    local = local_folder(spec)
    return str(local) if local else f"{spec.model}@{pin_commit(hub, spec.model, spec.revision, 'model')}"


def find_made(
    store: ArtifactStore, cls: type[A], spec: Spec, origin: str, fits: Callable[[A], bool] = lambda _: True
) -> A | None:
    """Return the newest artifact that this spec made on the base called `origin`, None without one.

    What older runs left may have lost its parents: that is no fault of this run.
    """
    for found in reversed(store.known(cls)):
        if not _is_by(spec, found, store):
            continue
        try:
            if store.ancestor(found, BaseCheckpoint, needs_files=False).origin == origin and fits(found):
                return found
        except MissingError:
            continue
    return None


def find_adapter(recipe: Recipe, origin: str, store: ArtifactStore) -> TrainedAdapter | None:
    """Return the newest adapter that this recipe made on the base called `origin`, wherever it was trained.

    Data that were cleared away since are taken for the recipe's: it is made of them again, under the same key.
    """

    def is_of_data(adapter: TrainedAdapter) -> bool:
        try:
            packed = store.ancestor(adapter, PackedDataset, needs_files=False)
            dataset = store.ancestor(adapter, FetchedDataset, needs_files=False)
        except MissingError:
            return True
        return _is_by(recipe.pack, packed, store) and _is_by(recipe.fetch, dataset, store)

    return find_made(store, TrainedAdapter, recipe.train, origin, is_of_data)


def _is_by(spec: Spec, artifact: Artifact, store: ArtifactStore) -> bool:
    """Say whether an artifact was made by knobs that decide the same."""
    try:
        kept = validate(type(spec), (store.record(type(artifact), artifact.key) or {}).get("spec", {}))
    except SpecError:  # another version's
        return False
    return kept.key_values() == spec.key_values()


def find_tokenizer(spec: BaseModelSpec, pretraining: PretrainSpec | None, store: ArtifactStore, hub: HfApi) -> Path:
    """Return a folder with the base's tokenizer, fetched, built or trained without its weights."""
    local = local_folder(spec)
    if pretraining is not None and pretraining.tokenizer == "gpt-oss":
        return shared_tokenizer(store.root)  # before the corpus is read
    if pretraining is not None:
        return prepare_corpus(pretraining, store, hub).path / "tokenizer"
    if local is not None:
        return local
    commit = pin_commit(hub, spec.model, spec.revision, "model")
    with hub_errors(f"tokenizer of {spec.model}@{commit[:8]}"):
        return Path(hub.snapshot_download(spec.model, revision=commit, allow_patterns=_TOKENIZER_FILES))
