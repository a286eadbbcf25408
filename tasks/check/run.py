"""Look at a recipe before it runs: what can't work is said in the first seconds, all of it at once.

The one verb that looks into the others' pure and cheap parts: each finds its own faults again at
its turn, but by then an hour may have gone.

Ring: edge.
"""

import importlib.util
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, MergedModel, TrainedModel
from tasks.check.base import BaseFacts, find_adapter, find_made, look_at_base
from tasks.corpus.run import pin_inputs, survey_corpus
from tasks.costs import say_needs
from tasks.errors import CapacityError, SpecError, TataraError, TransientError
from tasks.fetch.run import downloaded_bytes, survey_dataset
from tasks.gptoss.layout import MODEL_TYPE
from tasks.hub import find_repo, require_target
from tasks.machine import list_gpus
from tasks.models import require_mxfp4
from tasks.pretrain.run import check_pretraining
from tasks.reinforce.run import check_rewards, require_runnable
from tasks.serve.handover import holds_gpu
from tasks.serve.preflight import check_ports
from tasks.serve.settings import NO_OVERRIDES, SERVICES, service_settings
from tasks.specs import BaseRelease, PpoRecipe, PretrainSpec, PublishSpec, Recipe, ReinforceRecipe, ReinforceSpec, Spec
from tasks.targets import Target, find_targets
from tasks.train.needs import choose_attention, require_quantizable
from tasks.train.plan import Workload, plan_step
from tasks.train.run import (
    check_launch,
    checkpoint_bytes,
    gpu_room,
    host_room,
    launched_spec,
    require_training_memory,
    require_warm,
    say_slow_dtype,
    training_gpus,
)
from tasks.train.weights import require_offloadable

_MIN_FREE_BYTES = 2 << 30
Released = Recipe | BaseRelease | PpoRecipe  # whatever holds publish, serve and verify


def check_recipe(
    recipe: Recipe | ReinforceRecipe,
    pretraining: PretrainSpec | None,
    store: ArtifactStore,
    hub: HfApi,
    host: Mapping[str, str] = NO_OVERRIDES,
) -> list[str]:
    """Run every check; return what was found in order, one line each.

    A recipe of rewards is checked as SFT with the same base, data and adapter, whose rows hold a sequence, and for its
    rewards. What generation holds beside (its cache) is not in the estimate.

    Args:
        recipe: the resolved recipe.
        pretraining: the recipe of its base when that is made here.
        store: where artifacts will go.
        hub: client with the token that will be used.
        host: what the Serving Host block overrides.
    Raises: the error itself when there is one fault; SpecError listing all when there are several;
        TransientError when the Hub can't be reached, so that the check is retried.
    """
    facts: list[BaseFacts] = []  # empty when the base can't be looked at: then that is the fault to say
    rewarded = recipe.reinforce if isinstance(recipe, ReinforceRecipe) else None
    recipe = _as_sft(recipe) if isinstance(recipe, ReinforceRecipe) else recipe
    checks: list[Callable[[], str]] = [
        lambda: _check_contract(recipe, pretraining),
        lambda: _check_data(recipe, hub),
        lambda: _look(recipe, pretraining, hub, facts),
        lambda: _check_fit(recipe, facts),
        lambda: _check_rewards(rewarded, facts) if rewarded else "",
        lambda: _check_room(recipe, store, facts),
        lambda: _check_launch(recipe, store, facts),
        lambda: _check_memory(recipe, store, facts),
        lambda: say_slow_dtype(recipe.train),
    ]
    return run_all([*checks, *late_checks(recipe, store, hub, host)])


def check_release(
    recipe: Released,
    store: ArtifactStore,
    hub: HfApi,
    host: Mapping[str, str] = NO_OVERRIDES,
    whole: TrainedModel | None = None,
) -> list[str]:
    """Run the checks that matter from the merge on, or for a model trained as a whole; returns and raises as above."""
    first = [] if whole is None else [lambda: _check_whole(recipe, whole)]
    recipe = recipe.model_copy(update={"until": "verify"}) if isinstance(recipe, PpoRecipe) else recipe
    return run_all([*first, *late_checks(recipe, store, hub, host)])


def check_publish(recipe: Recipe, store: ArtifactStore, hub: HfApi) -> list[str]:
    """Run the checks of a run that publishes and serves nothing; returns and raises as check_recipe does."""
    return run_all([lambda: _check_publish(recipe, hub), lambda: check_storage(store)])


def check_pretrain(spec: PretrainSpec, store: ArtifactStore, hub: HfApi) -> list[str]:
    """Run the checks of a pretraining, whose corpus may take hours to tokenise; returns and raises as check_recipe."""
    pins: dict[str, str] = {}

    def look() -> str:
        pins.update(pin_inputs(spec, hub))
        return f"corpus: {survey_corpus(spec, hub)}"

    def fit() -> str:
        return check_pretraining(spec, pins, store, has_gpu=bool(list_gpus()))

    return run_all([look, fit, lambda: check_storage(store)])


def late_checks(recipe: Released, store: ArtifactStore, hub: HfApi, host: Mapping[str, str]) -> list[Callable[[], str]]:
    """Return the checks of what comes after the model; a recipe that ends with its publication serves nothing."""
    serves = not isinstance(recipe, PpoRecipe) or recipe.until == "verify"
    return [
        lambda: _check_publish(recipe, hub),
        lambda: _check_serving(recipe, store, host) if serves else "serve: not asked for",
        lambda: check_storage(store),
    ]


def run_all(checks: list[Callable[[], str]]) -> list[str]:
    """Run each check; return their lines, or raise as check_recipe does."""
    said: list[str] = []
    faults: list[TataraError] = []
    for check in checks:
        try:
            line = check()
            said.extend([line] if line else [])
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
    return f"data: {survey_dataset(recipe.fetch, hub)}"


def _check_contract(recipe: Recipe, pretraining: PretrainSpec | None) -> str:
    """What is learnt must be what can be asked: vLLM reads every chat with a gpt-oss as harmony."""
    if pretraining and pretraining.tokenizer != "gpt-oss" and not recipe.fetch.text_column:
        raise SpecError(
            f"FetchSpec gives chats, but the base {recipe.base.model} has a vocabulary of its own (tokenizer = "
            f"{pretraining.tokenizer!r}), and vLLM reads each chat with a gpt-oss as harmony, so it would refuse them. "
            "Tune it on plain text (FetchSpec.text_column), which /v1/completions serves, or pretrain it with "
            "tokenizer='gpt-oss'"
        )
    return ""


def _look(recipe: Recipe, pretraining: PretrainSpec | None, hub: HfApi, facts: list[BaseFacts]) -> str:
    facts.append(look_at_base(recipe.base, pretraining, hub))
    return f"base: {facts[0].origin}" + (f", made here of {survey_corpus(pretraining, hub)}" if pretraining else "")


def _as_sft(recipe: ReinforceRecipe) -> Recipe:
    same, tokens = recipe.as_finetune(), max(recipe.pack.row_tokens, recipe.reinforce.max_sequence_tokens)
    return same.model_copy(update={"pack": recipe.pack.model_copy(update={"row_tokens": tokens})})


def _check_rewards(spec: ReinforceSpec, facts: list[BaseFacts]) -> str:
    if facts:
        require_runnable(spec, facts[0].config)
    return f"rewards: {check_rewards(spec)}"


def _check_fit(recipe: Recipe, facts: list[BaseFacts]) -> str:
    """Every target must hit, a row must fit the context and the server, the attention must be right for the base."""
    if not facts:
        return ""
    targets, context_tokens = find_targets(facts[0].shapes, recipe.train.lora), facts[0].context_tokens
    if context_tokens and recipe.pack.row_tokens > context_tokens:
        raise SpecError(
            f"PackSpec.row_tokens = {recipe.pack.row_tokens} but the base's context is {context_tokens} tokens: "
            "lower row_tokens"
        )
    longest = recipe.serve.max_model_len
    if context_tokens and longest > context_tokens:
        raise SpecError(f"ServeSpec.max_model_len = {longest} but the base's context is {context_tokens}: lower it")
    if recipe.pack.row_tokens >= longest:
        raise SpecError(
            f"ServeSpec.max_model_len = {longest} but a row holds {recipe.pack.row_tokens} tokens, and verify asks the "
            "server to score whole rows and to add one token: raise max_model_len or lower PackSpec.row_tokens"
        )
    if recipe.train.max_steps > 0:  # by epochs only the packed rows tell
        require_warm(0, recipe.train)
    choose_attention(
        facts[0].config.get("model_type", MODEL_TYPE), recipe.train, on_gpu=bool(training_gpus(recipe.train))
    )
    require_quantizable(facts[0].config, recipe.train)
    if stored := facts[0].config.get("quantization_config"):
        require_mxfp4(stored)
    return f"adapter: {len(targets)} weights, {sum(target.num_trainable for target in targets):,} trainable"


def _check_room(recipe: Recipe, store: ArtifactStore, facts: list[BaseFacts]) -> str:
    """Download, checkpoints and merged model together; published files are links to the merged ones."""
    if not facts:
        return ""
    base, element = facts[0], 4 if recipe.merge.dtype == "float32" else 2
    is_here = any(found.origin == base.origin for found in store.committed(BaseCheckpoint))
    num_trainable = sum(target.num_trainable for target in _targets(recipe, base))
    adapter = find_adapter(recipe, base.origin, store)
    merged = find_made(store, MergedModel, recipe.merge, base.origin)
    is_merged = adapter is not None and merged is not None and merged.parents[0] == adapter.ref
    needs = {
        "download": 0 if is_here else _download_bytes(recipe, base, store),
        "checkpoints": 0 if adapter else checkpoint_bytes(num_trainable, recipe.train),
        "merged model": 0 if is_merged else element * sum(prod(size) for size in base.shapes.values()),
    }
    files.require_disk(store.root, sum(needs.values()), f"the run ({say_needs(needs)})")
    return f"room: the run writes about {say_needs(needs)}"


def _download_bytes(recipe: Recipe, base: BaseFacts, store: ArtifactStore) -> int:
    """What is still to come: an interrupted download goes on where it was."""
    commit = base.origin.rpartition("@")[2]
    return max(0, base.download_bytes - downloaded_bytes(recipe.base, commit, store)) if base.download_bytes else 0


def _check_launch(recipe: Recipe, store: ArtifactStore, facts: list[BaseFacts]) -> str:
    """There must be machines for the training; not asked when the adapter is there already and goes on to publish."""
    is_elsewhere = recipe.train.launch.launcher != "local"
    if is_elsewhere and facts and (found := find_adapter(recipe, facts[0].origin, store)):
        return f"launch: not needed, {found.kind}/{found.short} is whole"
    return check_launch(recipe.train, store.root)


def _check_memory(recipe: Recipe, store: ArtifactStore, facts: list[BaseFacts]) -> str:
    """The peak of a training step must fit the GPU; not asked when the adapter is there already."""
    if not facts:
        return ""
    base = facts[0]
    if find_adapter(recipe, base.origin, store):
        return "memory: trained before"
    spec, targets = launched_spec(recipe.train), _targets(recipe, base)
    if targets:
        require_offloadable(base.config, spec, targets)
    work = Workload(
        shapes=base.shapes,
        config=base.config,
        spec=spec,
        targets=targets,
        row_tokens=recipe.pack.row_tokens,
    )
    ours_leaves = holds_gpu(store.root)
    plan = plan_step(work, gpu_room(spec, ours_leaves=ours_leaves), host_room(spec))
    return "memory: " + require_training_memory(work, plan, ours_leaves=ours_leaves)


def _targets(recipe: Recipe, base: BaseFacts) -> list[Target]:
    """Return what is hit; nothing when a target is wrong, which _check_fit says."""
    try:
        return find_targets(base.shapes, recipe.train.lora)
    except SpecError:
        return []


def _check_whole(release: Released, model: TrainedModel) -> str:
    config = files.read_json(Path(model.model_folder) / "config.json")
    context, longest = config.get("max_position_embeddings") or 0, release.serve.max_model_len
    if context and longest > context:
        raise SpecError(f"ServeSpec.max_model_len = {longest} but the model's context is {context}: lower it")
    require_whole(release.publish)
    return f"model: {model.origin}, {model.num_parameters:,} parameters"


def require_whole(spec: PublishSpec) -> str:
    """Raise SpecError for a publication that a model without an adapter can't have; there is nothing to say else."""
    if spec.what != "merged":
        raise SpecError(
            f"PublishSpec.what = {spec.what!r}, but a model that is trained as a whole has no adapter: leave it at "
            "'merged'"
        )
    return ""


def _check_publish(recipe: Released, hub: HfApi) -> str:
    repo_id = find_repo(recipe.publish)
    if not hub.token or not repo_id:
        lacking = "repo" if hub.token else "token"
        return f"publish: no Hub {lacking} is given, the model stays in a local folder in Hub layout"
    doing, spec = f"checking the Hub token for {repo_id}", recipe.publish
    name = require_target(hub, repo_id, doing, private=spec.private, create_pr=spec.create_pr)
    return f"publish: {spec.what} as {name} to {repo_id}{' by a pull request' if spec.create_pr else ''}"


def _check_serving(recipe: Released, store: ArtifactStore, host: Mapping[str, str]) -> str:
    settings = service_settings(str(store.root), recipe.serve, store.root, host)
    if not settings.vllm_python.exists():
        raise SpecError(
            f"vLLM's environment is not there ({settings.vllm_python}): make it with "
            "`python3 deployments/environments.py vllm`, or point TATARA_VLLM_PYTHON at another"
        )
    check_ports(settings, SERVICES)
    _check_keys(settings.spec.host, settings.variables)
    if (
        isinstance(recipe, Recipe)
        and recipe.train.quantization != "none"
        and importlib.util.find_spec("bitsandbytes") is None
    ):
        raise SpecError(
            f"TrainSpec.quantization = {recipe.train.quantization} needs bitsandbytes: install the train extra"
        )
    return f"serve: ports {recipe.serve.vllm_port} and {recipe.serve.gateway_port}"


def _check_keys(host: str, variables: Mapping[str, str]) -> None:
    """A gateway that others reach starts only with keys, and verify is one of those who ask it."""
    has_keys = bool(variables.get("GATEWAY_KEYS_FILE"))
    is_open = variables.get("GATEWAY_ALLOW_UNAUTHENTICATED", "").lower() in ("1", "true", "yes", "on")
    if has_keys and not variables.get("TATARA_GATEWAY_KEY"):
        raise SpecError(
            "GATEWAY_KEYS_FILE is set, so the gateway asks for a key, and TATARA_GATEWAY_KEY is not: make one with "
            "`python -m deployments.gateway.keys add verify` and set it in the worker's environment"
        )
    if not has_keys and not is_open and not (host.startswith("127.") or host in ("localhost", "::1")):
        raise SpecError(
            f"ServeSpec.host = {host!r} can be reached from outside, and the gateway does not start there without "
            "GATEWAY_KEYS_FILE: make a key, or set GATEWAY_ALLOW_UNAUTHENTICATED=true behind a proxy that asks"
        )


def check_storage(store: ArtifactStore) -> str:
    """Say how much is free, and that the remote takes files. Raises CapacityError when no run could begin."""
    free = files.free_bytes(store.root)
    if free < _MIN_FREE_BYTES:
        raise CapacityError(
            f"only {free / 1e9:.1f} GB are free below {store.root}, expected at least {_MIN_FREE_BYTES / 1e9:.1f} GB: "
            "free some space or point TATARA_HOME at a larger disk"
        )
    said = f"disk: {free / 1e9:.0f} GB free below {store.root}"
    return f"{said}; {store.remote.check()}" if store.remote else said


def keep_recipe(name: str, recipe: Spec, folder: Path, pretraining: PretrainSpec | None = None) -> Path:
    """Write the resolved recipe down beside the run, and that of its base when it is made here."""
    path = folder / "recipe.json"
    base = {"pretraining": pretraining.model_dump(mode="json")} if pretraining else {}
    files.write_json(path, {"recipe": name, "resolved": recipe.model_dump(mode="json"), **base})
    return path
