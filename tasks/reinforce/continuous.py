"""Rollouts by transformers' continuous batching: no padding, and a place that comes free goes to the next prompt.

    prompts -> generate_continuously() -> ids, and the log-probability of each as it was sampled

TRL's own call of it casts the adapter to bfloat16 for good, asks for no log-probabilities, and leaves the cache to grow
over what memory is free; so it is called here.

Ring: edge (live model); runs inside a trainer process.  Units: tokens.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from trl.models.utils import unwrap_model_for_generation

from tasks.errors import TrainingError
from tasks.gptoss.layout import MODEL_TYPE

_FLASH_PAGE, _MASKED_PAGE = 256, 32  # tokens: what flash attention's kernels want, and what wastes little of a mask
_MOST_BATCH_TOKENS = 8192  # transformers' own default


def generate_continuously(
    trainer: Any, prompt_ids: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:  # Any: a GRPOTrainer
    """Generate one completion for each prompt, in order. Raises TrainingError when a request fails.

    Sampling is seeded from torch's generator, which a checkpoint holds: a resumed run samples what the first one did.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    settings = copy(trainer.generation_config)
    settings.eos_token_id = model.generation_config.eos_token_id
    has_sinks = model.config.model_type == MODEL_TYPE
    config = sized_cache(list(map(len, prompt_ids)), trainer.max_completion_length, has_sinks=has_sinks)
    kwargs = trainer.args.gradient_checkpointing_kwargs
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=kwargs
        ) as generating,
        torch.no_grad(),
    ):
        said = generating.generate_batch(
            list(prompt_ids), generation_config=settings, continuous_batching_config=config, progress_bar=False
        )
        generating.train()
    if failed := [output.error for output in said.values() if output.error]:
        raise TrainingError(f"{len(failed)} of {len(prompt_ids)} completions failed: {failed[0]}")
    if len(said) != len(prompt_ids):
        raise TrainingError(f"continuous batching answered {len(said)} of {len(prompt_ids)} prompts")
    return [output.generated_tokens for output in said.values()], [output.logprobs for output in said.values()]


def sized_cache(lengths: Sequence[int], limit: int, *, has_sinks: bool) -> ContinuousBatchingConfig:
    """Return settings whose cache holds this rollout and no more.

    By default it takes what memory is free: learning needs that, and an attention with a mask computes over all of it.

    Args:
        lengths: tokens of each prompt.
        limit: tokens that are generated at most.
        has_sinks: flash attention, which needs no mask, would drop them.

    >>> config = sized_cache([10, 40], 30, has_sinks=True)
    >>> config.num_blocks, config.max_batch_tokens
    (7, 50)
    """
    page = _MASKED_PAGE if has_sinks or not torch.cuda.is_available() else _FLASH_PAGE
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=sum(-(-(length + limit) // page) + 1 for length in lengths),
        max_batch_tokens=max(len(lengths), min(_MOST_BATCH_TOKENS, sum(lengths))),
        return_logprobs=True,
        auto_switch_to_flash=not has_sinks,
    )
