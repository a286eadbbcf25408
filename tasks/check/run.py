"""Look at a recipe before it runs: what can't work is said in the first seconds, all of it at once.

The one verb that looks into the others' pure and cheap parts: each finds its own faults again at
its turn, but by then an hour may have gone.

Ring: edge.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore
from tasks.errors import CapacityError, SpecError, TataraError, TransientError
from tasks.fetch.run import check_model_folder, local_folder, pin_dataset, read_dataset
from tasks.gptoss.layout import parameter_shapes
from tasks.hub import pin_commit, require_writer
from tasks.serve.preflight import check_ports
from tasks.serve.settings import SERVICES, ServiceSettings
from tasks.specs import PretrainSpec, Recipe, Spec
from tasks.train.run import base_shapes
from tasks.train.targets import Shapes, find_targets

_MIN_FREE_BYTES = 2 << 30


def check_recipe(recipe: Recipe, pretraining: PretrainSpec | None, store: ArtifactStore, hub: HfApi) -> list[str]:
    """Run every check; return what was found in order, one line each.

    Args:
        recipe: the resolved recipe.
        pretraining: the recipe of its base when that is made here.
        store: where artifacts will go.
        hub: client with the token that will be used.
    Raises: the error itself when there is one fault; SpecError listing all when there are several;
        TransientError when the Hub can't be reached, so that the check is retried.
    """
    data: list[Callable[[], str]] = [
        lambda: _check_data(recipe, hub),
        lambda: _check_base(recipe, pretraining, hub),
    ]
    return _run_all([*data, *_late_checks(recipe, store, hub)])


def check_release(recipe: Recipe, store: ArtifactStore, hub: HfApi) -> list[str]:
    """Run the checks that matter from the merge on; returns and raises as check_recipe does."""
    return _run_all(_late_checks(recipe, store, hub))


def _late_checks(recipe: Recipe, store: ArtifactStore, hub: HfApi) -> list[Callable[[], str]]:
    return [
        lambda: _check_publish(recipe, hub),
        lambda: _check_serving(recipe, store),
        lambda: _check_disk(store),
    ]


def _run_all(checks: list[Callable[[], str]]) -> list[str]:
    said: list[str] = []
    faults: list[TataraError] = []
    for check in checks:
        try:
            said.append(check())
        except TransientError:
            raise
        except TataraError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise SpecError(f"{len(faults)} faults: " + " | ".join(str(fault) for fault in faults))
    return said


def _check_data(recipe: Recipe, hub: HfApi) -> str:
    """A Hub data set must be there; files are read: a bad row is said before a base is trained or downloaded."""
    pins = pin_dataset(recipe.fetch, hub)
    said = f"data: {recipe.fetch.source} at {next(iter(pins.values()))[:12]}"
    if "commit" in pins:
        return said
    train, validation, _ = read_dataset(recipe.fetch, hub, pins)
    return f"{said}, {len(train)} train and {len(validation)} validation rows"


def _check_base(recipe: Recipe, pretraining: PretrainSpec | None, hub: HfApi) -> str:
    """Where names and shapes are known already, every target must hit and a row must fit the context."""
    local = local_folder(recipe.base)
    if pretraining is not None:
        _check_fit(recipe, parameter_shapes(pretraining.shape), pretraining.shape.context_tokens)
        return f"base: {recipe.base.model}, made here"
    if local is None:
        commit = pin_commit(hub, recipe.base.model, recipe.base.revision, "model")
        return f"base: {recipe.base.model} at {commit[:12]}"
    check_model_folder(local)
    context = files.read_json(local / "config.json").get("max_position_embeddings", 0)
    _check_fit(recipe, base_shapes(local), context)
    return f"base: {local}"


def _check_fit(recipe: Recipe, shapes: Shapes, context_tokens: int) -> None:
    find_targets(shapes, recipe.train.lora)
    if context_tokens and recipe.pack.row_tokens > context_tokens:
        raise SpecError(
            f"PackSpec.row_tokens = {recipe.pack.row_tokens} but the base's context is {context_tokens} tokens: "
            "lower row_tokens"
        )


def _check_publish(recipe: Recipe, hub: HfApi) -> str:
    repo_id = recipe.publish.repo_id or os.environ.get("HF_REPO_NAME", "")
    if not hub.token or not repo_id:
        lacking = "repo" if hub.token else "token"
        return f"publish: no Hub {lacking} is given, the model stays in a local folder in Hub layout"
    name = require_writer(hub, "checking the Hub token")
    return f"publish: as {name} to {repo_id}"


def _check_serving(recipe: Recipe, store: ArtifactStore) -> str:
    settings = ServiceSettings(model=str(store.root), spec=recipe.serve, home=store.root)
    if not settings.vllm_python.exists():
        raise SpecError(
            f"vLLM's environment is not there ({settings.vllm_python}): make it with "
            "`python3 deployments/environments.py vllm`, or point TATARA_VLLM_PYTHON at another"
        )
    check_ports(settings, SERVICES)
    if recipe.train.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError(
            f"TrainSpec.quantization = {recipe.train.quantization} needs bitsandbytes: install the train extra"
        )
    return f"serve: ports {recipe.serve.vllm_port} and {recipe.serve.gateway_port}"


def _check_disk(store: ArtifactStore) -> str:
    free = files.free_bytes(store.root)
    if free < _MIN_FREE_BYTES:
        raise CapacityError(
            f"only {free / 1e9:.1f} GB are free below {store.root}, expected at least {_MIN_FREE_BYTES / 1e9:.1f} GB: "
            "free some space or point TATARA_HOME at a larger disk"
        )
    return f"disk: {free / 1e9:.0f} GB free below {store.root}"


def keep_recipe(name: str, recipe: Spec, folder: Path) -> Path:
    """Write the resolved recipe down beside the run."""
    path = folder / "recipe.json"
    files.write_json(path, {"recipe": name, "resolved": recipe.model_dump(mode="json")})
    return path
