"""The columns of metrics.csv and generations.csv, in their order; docs/reinforcement.md says what each means.

Ring: pure.
"""

from tasks.specs import ReinforceSpec

_FIRST = ("step", "loss", "reward", "reward_std")
_REST = (
    "kl", "entropy", "clip_ratio", "same_reward_share", "completion_tokens", "completion_tokens_min",
    "completion_tokens_max", "cut_off_share", "ratio_mean", "ratio_min", "ratio_max", "adapter_share",
    "adapter_share_error", "adapter_change", "learning_rate", "grad_norm", "rollout_s", "score_s", "learn_s",
    "rollout_tokens_per_s", "learnt_tokens_per_s", "peak_bytes", "time",
)  # fmt: skip


def metrics_columns(spec: ReinforceSpec) -> tuple[str, ...]:
    """Return the columns of metrics.csv.

    >>> metrics_columns(ReinforceSpec())[:6]
    ('step', 'loss', 'reward', 'reward_std', 'exact_mean', 'exact_std')
    """
    each = [f"{reward.column}_{kind}" for reward in spec.rewards for kind in ("mean", "std")]
    return (*_FIRST, *each, *_REST)


def generations_columns(spec: ReinforceSpec) -> tuple[str, ...]:
    """Return the columns of generations.csv.

    >>> generations_columns(ReinforceSpec())[:7]
    ('step', 'prompt', 'question', 'completion', 'answer', 'exact', 'reward')
    """
    rewards = [reward.column for reward in spec.rewards]
    first = ("step", "prompt", "question", "completion", "answer")
    return (*first, *rewards, "reward", "advantage", "num_tokens", "finished_itself", "whole")
