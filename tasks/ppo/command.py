"""Render what runs on the cluster: verl's main_ppo with its hydra overrides, and its variables.

    PpoSpec + Inputs -> overrides() -> entrypoint() -> Ray job

Ring: pure.
"""

import shlex
from dataclasses import dataclass
from typing import Any

from tasks.specs import PpoSpec

MAIN = "verl.trainer.main_ppo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Paths that every node of the cluster sees."""

    train_file: str
    test_file: str
    model: str
    checkpoints: str


def count_steps(num_train_rows: int, spec: PpoSpec) -> int:
    """Return how many steps verl will make: whole batches of an epoch, or what is asked for.

    >>> count_steps(1000, PpoSpec(total_epochs=2))
    6
    """
    by_epochs = num_train_rows // spec.train_batch_size * spec.total_epochs
    return spec.total_training_steps or by_epochs


def overrides(spec: PpoSpec, inputs: Inputs) -> list[str]:
    """Return hydra overrides; the last ones are the recipe's own and win.

    >>> [word for word in overrides(PpoSpec(), Inputs(train_file="/t", test_file="/v", model="/m", checkpoints="/c"))
    ...     if word.startswith("critic.")][:2]
    ['critic.model.path=/m', 'critic.optim.lr=1e-05']
    """
    attention = {"attn_implementation": spec.attention}
    values: dict[str, Any] = {  # Any: values of a config
        "data.train_files": inputs.train_file,
        "data.val_files": inputs.test_file,
        "data.train_batch_size": spec.train_batch_size,
        "data.max_prompt_length": spec.max_prompt_length,
        "data.max_response_length": spec.max_response_length,
        "data.filter_overlong_prompts": spec.filter_overlong_prompts,
        "data.truncation": "error",
        "actor_rollout_ref.model.path": inputs.model,
        **{f"+actor_rollout_ref.model.override_config.{name}": value for name, value in attention.items()},
        "actor_rollout_ref.actor.optim.lr": spec.actor_learning_rate,
        "actor_rollout_ref.actor.ppo_mini_batch_size": spec.ppo_mini_batch_size,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": spec.actor_micro_batch_size_per_gpu,
        "actor_rollout_ref.rollout.name": spec.rollout,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": spec.rollout_tensor_parallel,
        "actor_rollout_ref.rollout.gpu_memory_utilization": spec.gpu_memory_utilization,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": spec.rollout_log_prob_micro_batch_size_per_gpu,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": spec.rollout_log_prob_micro_batch_size_per_gpu,
        "critic.model.path": spec.critic_model or inputs.model,
        "critic.optim.lr": spec.critic_learning_rate,
        "critic.ppo_micro_batch_size_per_gpu": spec.critic_micro_batch_size_per_gpu,
        **{f"+critic.model.override_config.{name}": value for name, value in attention.items()},
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": spec.kl_in_reward,
        "algorithm.kl_ctrl.kl_coef": spec.kl_coef,
        "trainer.nnodes": spec.nnodes,
        "trainer.n_gpus_per_node": spec.n_gpus_per_node,
        "trainer.device": spec.device,
        "trainer.total_epochs": spec.total_epochs,
        **({"trainer.total_training_steps": spec.total_training_steps} if spec.total_training_steps else {}),
        "trainer.save_freq": spec.save_freq,
        "trainer.test_freq": spec.test_freq,
        "trainer.max_actor_ckpt_to_keep": spec.max_ckpt_to_keep,
        "trainer.max_critic_ckpt_to_keep": spec.max_ckpt_to_keep,
        "trainer.val_before_train": True,  # the score that the last one is held against
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": inputs.checkpoints,
        "trainer.project_name": spec.project_name,
        "trainer.experiment_name": spec.experiment_name,
        "hydra.run.dir": inputs.checkpoints,  # else below whatever folder the cluster was started in
        "hydra.output_subdir": "null",
        "trainer.logger": ["console", "wandb"] if spec.report_to == "wandb" else ["console"],
    }
    return [*(f"{name}={_said(value)}" for name, value in values.items()), *spec.overrides]


def entrypoint(python: str, spec: PpoSpec, inputs: Inputs) -> str:
    """Return the shell command of the job."""
    return shlex.join([python, "-u", "-m", MAIN, *overrides(spec, inputs)])


def job_variables(spec: PpoSpec) -> dict[str, str]:
    """Return the job's environment on every node; it can be read on Ray's dashboard.

    >>> job_variables(PpoSpec(report_to="wandb", wandb_entity="team", environment={"NVTE_FUSED_ATTN": "0"}))
    {'HYDRA_FULL_ERROR': '1', 'PYTHONWARNINGS': 'ignore', 'WANDB_ENTITY': 'team', 'NVTE_FUSED_ATTN': '0'}
    """
    entity = {"WANDB_ENTITY": spec.wandb_entity} if spec.report_to == "wandb" and spec.wandb_entity else {}
    return {"HYDRA_FULL_ERROR": "1", "PYTHONWARNINGS": "ignore", **entity, **spec.environment}


def _said(value: Any) -> str:  # Any: values of a config
    """Write a value as hydra reads it; a text with other characters than a path's is quoted.

    >>> _said(True), _said(1e-6), _said(["console"]), _said("a b")
    ('true', '1e-06', '[console]', "'a b'")
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_said, value))}]"
    if isinstance(value, str) and not all(letter.isalnum() or letter in "/._-:@" for letter in value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
