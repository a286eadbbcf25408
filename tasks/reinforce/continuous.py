"""Rollouts by transformers' continuous batching: no padding, and a place that comes free goes to the next prompt.

    prompts -> generate_continuously() -> ids, and the log-probability of each as it was sampled

TRL's own call of it casts the adapter to bfloat16 for good, asks for no log-probabilities, and leaves the cache to grow
over what memory is free. transformers' `generate_batch` starts its thread before it hands it the prompts, so that what
is sampled depends on how many of them the thread finds there; and it drops the class of an error. So its manager is
driven from here.

Ring: edge (live model); runs inside a trainer process.  Units: tokens.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from trl.models.utils import unwrap_model_for_generation

from tasks.errors import SpecError, TrainingError
from tasks.gptoss.layout import MODEL_TYPE
from tasks.lifeline import lifeline

_FLASH_PAGE, _MASKED_PAGE = 256, 32  # tokens: what flash attention's kernels want, and what wastes little of a mask
_FLASH_BATCH, _MASKED_BATCH = 8192, 1024  # tokens: transformers' default; with a mask each computes over all the others


def generate_continuously(
    trainer: Any, prompt_ids: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:  # Any: a GRPOTrainer
    """Generate one completion for each prompt, in order. Raises TrainingError, or what says that memory ran out.

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
        attention = generating.config._attn_implementation
        try:
            said = _complete(generating, prompt_ids, settings, config, trainer.state.global_step)
        finally:
            generating.set_attn_implementation(attention)  # the manager leaves its own where it could not start
            generating.train()
    return [output.generated_tokens for output in said], [output.logprobs for output in said]


def _complete(
    model: Any, prompt_ids: Sequence[list[int]], settings: Any, config: ContinuousBatchingConfig, step: int
) -> list[Any]:  # Any: a PeftModel, a GenerationConfig; transformers' outputs
    """Run the engine until each prompt has its completion; its thread has ended when this returns or raises."""
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompt_ids)),
        max_generated_length=settings.max_new_tokens,
        num_requests=len(prompt_ids),
    )
    manager = model.init_continuous_batching(settings, config, hints)
    found: dict[str, Any] = {}  # Any: as above
    try:
        manager.warmup()
        names = manager.add_requests(list(prompt_ids))  # all are there before the thread looks: it is never a race
        manager.start()
        num_batches = 0
        while len(found) < len(names):
            is_running = manager.is_running()  # asked first, so that what it leaves at its end is read
            if (output := manager.get_result(timeout=1)) is not None:
                found[output.request_id] = output
            elif not is_running:
                break
            if (done := getattr(manager, "current_batch", 0)) > num_batches:  # an engine that hangs makes no progress
                num_batches = done
                lifeline.beat("rollout", step)
    finally:
        manager.stop(hard_stop=True)
        manager.destroy()
    _require_whole(found, names, manager.background_thread_status.fatal_error)
    return [found[name] for name in names]


def _require_whole(found: dict[str, Any], names: Sequence[str], fatal: Exception | None) -> None:  # Any: as above
    """Raise what ended the engine's thread, or TrainingError where a completion failed or is not there."""
    if isinstance(fatal, torch.OutOfMemoryError | MemoryError):
        raise fatal
    if fatal is not None:
        raise TrainingError(
            f"continuous batching failed ({fatal!r}): use rollouts='transformers' if it does so again"
        ) from fatal
    failed = [output.error for output in found.values() if output.error is not None]
    if failed or len(found) < len(names):
        missing = len(names) - len(found) + len(failed)
        raise TrainingError(
            f"{missing} of {len(names)} completions failed in continuous batching"
            f"{f': {failed[0]}' if failed else ''}: use rollouts='transformers' if it does so again"
        )


def require_pages(model: Any) -> None:  # Any: a PreTrainedModel
    """Raise SpecError for a model that computes attention by itself, and so knows no pages."""
    if not model._supports_attention_backend:
        raise SpecError(
            f"ReinforceSpec.rollouts = 'continuous' with a {model.config.model_type}: transformers' "
            f"{type(model).__name__} computes its attention itself, which knows no pages; use 'transformers'"
        )


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
    >>> sized_cache([4000, 4000], 30, has_sinks=True).max_batch_tokens
    1024
    """
    is_masked = has_sinks or not torch.cuda.is_available()
    page, most = (_MASKED_PAGE, _MASKED_BATCH) if is_masked else (_FLASH_PAGE, _FLASH_BATCH)
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=sum(-(-(length + limit) // page) + 1 for length in lengths),
        max_batch_tokens=max(len(lengths), min(most, sum(lengths))),
        return_logprobs=True,
        auto_switch_to_flash=not has_sinks,
    )
