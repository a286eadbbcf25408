"""Start and watch the GRPO process; turn its end into an artifact or an error.

    PackedDataset + BaseCheckpoint (+ TrainedAdapter) + ReinforceSpec -> tasks.reinforce.worker -> adapter/, streams

Ring: edge. Imports no torch.
"""

import logging
import os
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    PackedDataset,
    TrainedAdapter,
    make_key,
)
from tasks.errors import LostError, OutOfMemoryError, RewardError, RolloutError, SpecError, TrainingError
from tasks.lifeline import HEARTBEAT
from tasks.machine import list_gpus
from tasks.metrics import read_metrics
from tasks.models import base_shapes
from tasks.reinforce.attention import choose_attention
from tasks.reinforce.columns import generations_columns, metrics_columns
from tasks.reinforce.own import load_reward, source_digest
from tasks.reinforce.report import reward_distributions
from tasks.reinforce.rollouts import (
    Rollouts,
    choose_rollouts,
    choose_without_vllm,
    require_continuous,
    require_vllm,
)
from tasks.reinforce.said import IN_REWARD
from tasks.reinforce.streams import read_rows
from tasks.reinforce.vllm_python import Engine
from tasks.reinforce.vllm_python import variables as engine_variables
from tasks.specs import ReinforceSpec
from tasks.supervision import read_beat
from tasks.targets import Target, find_targets
from tasks.trainer_job import ProgressFn, Terms, made_adapter, run_trainer

VERSION = 2  # with vLLM, 1 hardly learnt from long completions
TRAINER = "tasks.reinforce.worker"
BESIDE_VLLM = "tasks.reinforce.beside_vllm"  # the same, in vLLM's environment
logger = logging.getLogger(__name__)
RoomFn = Callable[[], None]  # frees a GPU that is ours to free


def reinforce_adapter(
    packed: PackedDataset,
    base: BaseCheckpoint,
    spec: ReinforceSpec,
    store: ArtifactStore,
    on_progress: ProgressFn,
    *,
    start: TrainedAdapter | None = None,
    make_room: RoomFn = lambda: None,
) -> TrainedAdapter:
    """Learn from rewards, resuming what an earlier try left; a second call returns the finished one.

    Args:
        packed: its prompts are asked, its answers are what rewards compare with.
        base: the model.
        spec: the knobs.
        store: where the artifact goes.
        on_progress: called with each step's record.
        start: an adapter of this base to go on from; without one the adapter begins at zero.
        make_room: frees a GPU that is ours to free.
    Raises: SpecError (a reward, a target, the attention), DataError, OutOfMemoryError, TrainingError
        (RewardError of a reward that failed), TransientError (a judge that stays away).
    """
    targets = check_reinforcement(base, spec, start)
    pins = {reward.column: digest for reward in spec.rewards if (digest := source_digest(reward))}
    parents = (packed, base, *([start] if start else []))
    key = make_key("reinforce", VERSION, spec, pins, parents)
    with store.claim(TrainedAdapter, key) as claim:
        if claim.found:
            return claim.found
        make_room()
        num_trainable = sum(target.num_trainable for target in targets)
        room = (spec.keep_checkpoints + 2) * 12 * num_trainable + (64 << 20)
        files.require_disk(claim.folder, room, "learning from rewards")
        job = {
            "folder": str(claim.folder),
            "spec": spec.model_dump(mode="json"),
            "base_folder": base.model_folder,
            "packed_folder": packed.folder,
            "start_adapter": start.adapter_folder if start else None,
        }
        result = _run(job, base, spec, on_progress)
        artifact = made_adapter(key, claim.folder, parents, base, result)
        generations = read_rows(claim.folder / spec.generations_csv)
        about = {
            "pins": pins,
            "rewards": reward_distributions(generations, [reward.column for reward in spec.rewards]),
            "num_completions": len(generations),
        }
        return claim.commit(artifact, spec=spec, about=about)


def _run(
    job: dict[str, Any],  # Any: JSON values
    base: BaseCheckpoint,
    spec: ReinforceSpec,
    on_progress: ProgressFn,
) -> dict[str, Any]:  # Any: JSON values
    """Run the worker; where an engine was our own choice and fails before the first step, with a slower one to the end.

    Only for what it did, or may have done: a reward that fails would fail again, the slow way.
    """
    folder = Path(job["folder"])
    gpu = next(iter(list_gpus()), None) if spec.device_map == "auto" else None
    element = 4 if spec.dtype == "float32" else 2
    weights_bytes = element * sum(map(prod, base_shapes(Path(base.model_folder)).values()))
    config = files.read_json(Path(base.model_folder) / "config.json")
    chosen = choose_rollouts(spec, config, weights_bytes, gpu)
    if spec.rollouts == "auto" and (began := _began_with(folder)):
        logger.info("transformers generates, as in the steps that are there")
        chosen = began
    while True:
        try:
            return _run_with(chosen, job, spec, on_progress, on_gpu=gpu is not None)
        except (TrainingError, OutOfMemoryError) as error:
            why = blame_engine(error, chosen, has_begun=bool(read_metrics(folder / "metrics.jsonl")))
            if not why or spec.rollouts != "auto":
                raise
            logger.warning("%s (%s); transformers generates, several times slower", why, error)
        chosen = choose_without_vllm(spec, config) if chosen.engine else Rollouts()


def blame_engine(error: Exception, chosen: Rollouts, *, has_begun: bool = False) -> str:
    """Return in what way a worker's end may be its engine's doing; empty: in none.

    Once steps are there (`has_begun`) an engine goes on that made them, but for one of transformers' that keeps its
    cache while the model learns: a longer batch may leave no memory for both, in each try again.
    """
    if chosen == Rollouts():
        return ""
    if has_begun and not (chosen.is_continuous and isinstance(error, OutOfMemoryError)):
        return ""
    name = "vLLM" if chosen.engine else "continuous batching"
    if isinstance(error, RolloutError):
        return f"{name} could not generate"
    if isinstance(error, OutOfMemoryError):
        return f"the memory did not suffice with {name} beside the model"
    return f"the worker ended beside {name} without saying why" if _is_silent(error) else ""


def _is_silent(error: Exception) -> bool:
    """Say whether a worker died or hung, so that only its heartbeat tells where."""
    return isinstance(error, LostError) or isinstance(error.__cause__, TimeoutError)


def _began_with(folder: Path) -> Rollouts | None:
    """Return with which of transformers' two ways an earlier try made steps; None: with neither.

    A vLLM that failed then would only fail again, and what one samples the other does not.
    """
    told = folder / "job.json"
    if not read_metrics(folder / "metrics.jsonl") or not told.exists():
        return None
    name = files.read_json(told)["spec"]["rollouts"]
    return {each.name: each for each in (Rollouts(), Rollouts(is_continuous=True))}.get(name)


def _run_with(
    chosen: Rollouts,
    job: dict[str, Any],  # Any: JSON values
    spec: ReinforceSpec,
    on_progress: ProgressFn,
    *,
    on_gpu: bool,
) -> dict[str, Any]:  # Any: JSON values
    told = {"rollouts": chosen.name, "vllm_memory_share": chosen.memory_share}
    module = BESIDE_VLLM if chosen.engine and chosen.engine.packages else TRAINER
    work = {**job, "spec": {**job["spec"], **told}}
    folder = Path(job["folder"])
    try:
        return run_trainer(module, folder, work, _terms(spec, chosen.engine, on_gpu=on_gpu), on_progress)
    except TrainingError as error:
        phase, _, reward = str(read_beat(folder / HEARTBEAT).get("phase", "")).partition(" ")
        if phase != IN_REWARD or not _is_silent(error):
            raise
        raise RewardError(_say_silence(reward, error, spec)) from error


def _say_silence(reward: str, error: TrainingError, spec: ReinforceSpec) -> str:
    """Return what is to be done about a reward in which the worker died or hung."""
    if isinstance(error, LostError):
        way_out = "see that it neither ends the process (os._exit) nor crashes it, and what memory it takes"
        return f"the process ended inside the reward {reward}: {way_out}. {error}"
    return (
        f"the reward {reward} did not come back: give it a time limit of its own, or raise "
        f"ReinforceSpec.stall_timeout_s ({spec.stall_timeout_s:g} s). {error}"
    )


def check_reinforcement(base: BaseCheckpoint, spec: ReinforceSpec, start: TrainedAdapter | None = None) -> list[Target]:
    """Return what gets an adapter. Raises SpecError or MissingError for what can be known before a model is loaded."""
    check_rewards(spec)
    require_runnable(spec, files.read_json(Path(base.model_folder) / "config.json"))
    if start:
        _require_fitting(start, base, spec)
    return find_targets(base_shapes(Path(base.model_folder)), spec.lora)


def require_runnable(spec: ReinforceSpec, config: dict[str, Any]) -> None:  # Any: config.json
    """Raise SpecError or MissingError where attention, context, quantization or rollouts don't fit the base."""
    choose_attention(config.get("model_type", ""), spec)
    context = config.get("max_position_embeddings") or 0
    if context and spec.max_sequence_tokens > context:
        raise SpecError(
            f"ReinforceSpec.max_sequence_tokens = {spec.max_sequence_tokens} but the base's context is {context}: "
            "lower it"
        )
    if config.get("quantization_config") and spec.quantization != "none":
        raise SpecError(
            f"ReinforceSpec.quantization = {spec.quantization} but the base is stored as "
            f"{config['quantization_config'].get('quant_method')}: set it to none, which learns on it unpacked, or "
            "name a base in bfloat16"
        )
    if spec.rollouts == "vllm":
        require_vllm(spec, config)
    if spec.rollouts == "continuous":
        require_continuous(spec, config)


def check_rewards(spec: ReinforceSpec) -> str:
    """Load every reward and name them. Raises SpecError for one that can't be used."""
    for reward in spec.rewards:
        load_reward(reward)
    for columns in (metrics_columns(spec), generations_columns(spec)):
        if twice := next((name for name in columns if columns.count(name) > 1), ""):
            raise SpecError(f"a reward makes the column {twice!r} of the streams twice: give it another label")
    return ", ".join(f"{reward.weight:g} x {reward.column}" for reward in spec.rewards)


def _require_fitting(start: TrainedAdapter, base: BaseCheckpoint, spec: ReinforceSpec) -> None:
    if start.base_digest != base.model_digest:
        raise SpecError(f"adapter {start.short} was trained on another base than {base.origin}: name one of this base")
    if spec.beta:
        raise SpecError(
            f"ReinforceSpec.beta = {spec.beta:g} with adapter {start.short}: TRL would measure the KL from the base "
            "and not from that adapter; set beta to 0"
        )
    config = files.read_json(Path(start.adapter_folder) / "adapter_config.json")
    mine = {
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "use_rslora": spec.lora.rslora,
        "target_modules": sorted(spec.lora.target_modules),
        "target_parameters": sorted(spec.lora.target_parameters),
    }
    theirs = {name: sorted(value) if isinstance(value := config.get(name), list) else value for name in mine}
    theirs["target_modules"], theirs["target_parameters"] = (
        theirs[name] or [] for name in ("target_modules", "target_parameters")
    )
    for name, value in mine.items():
        if theirs[name] != value:
            raise SpecError(
                f"adapter {start.short} has {name} = {theirs[name]} but ReinforceSpec.lora gives {value}: to go on "
                "from an adapter the LoRA must be the same"
            )


def _terms(spec: ReinforceSpec, engine: Engine | None, *, on_gpu: bool) -> Terms:
    """Return how the process is run and watched, and what its environment gets: the keys of judges pass to it alone."""
    names = [str(reward.arguments.get("api_key_variable", "")) for reward in spec.rewards if reward.name == "judge"]
    variables = {name: os.environ[name] for name in names if name in os.environ}
    path = os.environ.get("PYTHONPATH", "")
    if spec.device_map == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if engine:
        variables |= engine_variables(engine, on_gpu=on_gpu)
    logger.info("rewards: %s%s", check_rewards(spec), f" (PYTHONPATH {path})" if path else "")
    return Terms(
        stall_timeout_s=spec.stall_timeout_s,
        heartbeat_timeout_s=spec.heartbeat_timeout_s,
        stop_grace_s=spec.stop_grace_s,
        variables=variables,
        python=engine.python if engine else sys.executable,
    )
