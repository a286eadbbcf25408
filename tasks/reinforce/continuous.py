"""Rollouts by transformers' continuous batching: no padding, and a place that comes free goes to the next prompt.

    prompts -> ContinuousEngine.generate() -> ids, and the log-probability of each as it was sampled

TRL's own call of it casts the adapter to bfloat16 for good, asks for no log-probabilities, and leaves the cache to grow
over what memory is free. transformers' `generate_batch` starts its thread before it hands it the prompts, so that what
is sampled depends on how many of them the thread finds there; and it drops the class of an error. So its manager is
driven from here.

The manager is kept between rollouts, with its cache, its buffers and its CUDA graphs. A graph reads addresses: those of
the weights, which the optimizer changes in place, and those of the manager's own buffers. What is made of an adapter in
a pass, such as its cast, is made again in each replay.

Ring: edge (live model); runs inside a trainer process.  Units: tokens.
"""

import gc
import time
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils.generic import is_flash_attention_requested
from trl.models.utils import unwrap_model_for_generation

from tasks.errors import RolloutError
from tasks.lifeline import lifeline
from tasks.reinforce.pages import has_flash, take_pages
from tasks.reinforce.rollouts import trait_without_pages

_NAMED_PAGE, _PAGE = 256, 32  # tokens: what others' flash attention wants, and what wastes little
_FLASH_BATCH, _PLAIN_BATCH = (
    8192,
    1024,
)  # tokens: transformers' default; plainly a prompt's logits are all there at once
_GRAPH_QUERIES, _GRAPH_KEYS = 32, 4096  # tokens: one graph for each multiple that is met
_MOST_KEPT = 65536  # tokens: 3.2 GB of gpt-oss-20b


class ContinuousEngine:
    """transformers' manager, made for the largest rollout that a run can have and kept from one rollout to the next.

    Its size follows from the run's data alone and not from the rollouts that were: a resumed run pads its keys, and so
    rounds, as the first one did. While the model learns it holds the keys and values of that rollout (gpt-oss-20b: 49
    kB a token), and what one layer of a decoding step takes. Of more than 65,536 tokens it keeps nothing: to make it
    anew takes little of so long a rollout.
    """

    def __init__(self, lengths: Sequence[int] = (), *, has_graphs: bool = False) -> None:
        """Make nothing yet.

        Args:
            lengths: tokens of each prompt of the run; of those that are not told, there is room for the first rollout.
            has_graphs: decode by CUDA graphs where attention is flash attention.
        """
        self._lengths = sorted(lengths, reverse=True)
        self._has_graphs = has_graphs and torch.cuda.is_available()
        self._manager: Any = None  # Any: transformers' ContinuousBatchingManager
        self._made_for = (0, 0)  # prompts, tokens that are generated at most
        self._num_blocks = self._num_kept = 0  # its pages, their tokens

    def generate(
        self, trainer: Any, prompt_ids: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:  # Any: a GRPOTrainer
        """Generate one completion for each prompt, in order. Raises RolloutError, or what says that memory ran out.

        Sampling is seeded from torch's generator, which a checkpoint holds: a resumed run samples what the first one
        did, whether its manager is a new one or was kept.
        """
        seed = int(torch.randint(2**32 - 1, (1,)))  # before a manager is made, which draws and seeds by itself
        kwargs = trainer.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=kwargs
            ) as generating,
            torch.no_grad(),
        ):
            attention = generating.config._attn_implementation
            generating.eval()
            try:
                self._start(trainer, generating, list(map(len, prompt_ids)))
                torch.manual_seed(seed)
                said = _complete(self._manager, prompt_ids, trainer.state.global_step)
                if self._num_kept > _MOST_KEPT:
                    self.drop()
            except BaseException:  # a stop too
                self.drop()
                raise
            finally:
                generating.set_attn_implementation(attention)  # the manager leaves its own where it could not start
                generating.train()
        return [output.generated_tokens for output in said], [output.logprobs for output in said]

    def drop(self) -> None:
        """Let go of the manager and its memory; the next rollout makes another."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        manager.destroy()
        if (fatal := manager.background_thread_status.fatal_error) is not None:
            fatal.__traceback__ = None  # is in the log, and would hold the cache for as long as the error is told
        manager.batch_processor = None
        gc.collect()  # it empties CUDA's own cache at its end

    def _start(self, trainer: Any, model: Any, lengths: list[int]) -> None:  # Any: as above, a PeftModel
        """Prepare. Raises RolloutError, so that `auto` goes on, for what transformers says of a model that it can't."""
        try:
            self._prepare(trainer, model, lengths)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of each family its own
            raise RolloutError(
                f"continuous batching could not start for a {model.config.model_type} ({error!r}): use "
                "rollouts='transformers'"
            ) from error

    def _prepare(self, trainer: Any, model: Any, lengths: list[int]) -> None:  # Any: as above, a PeftModel
        """Have a manager with room for these prompts, and the model's attention switched to pages."""
        limit, count = trainer.max_completion_length, len(lengths)
        is_named = is_flash_attention_requested(requested_attention_implementation=model.config._attn_implementation)
        is_flash = is_named or has_flash(model)
        has_graphs = self._has_graphs and is_flash
        sized = partial(sized_cache, is_named=is_named, is_flash=is_flash, has_graphs=has_graphs)
        needed = sized(lengths, limit)
        if self._made_for != (count, limit) or _num_blocks(needed) > self._num_blocks:
            self.drop()
        if self._manager is not None:
            if not is_named:
                take_pages(model)
            return
        largest = sized(self._longest(count, trainer.num_generations), limit)
        config = max(largest, needed, key=_num_blocks)  # of two as large the one that no rollout has a say in
        settings = copy(trainer.generation_config)
        settings.eos_token_id = model.generation_config.eos_token_id
        longest = max([*self._lengths, *lengths])
        hints = WorkloadHints(max_prompt_length=longest, max_generated_length=limit, num_requests=count)
        self._made_for, self._num_blocks = (count, limit), _num_blocks(config)
        self._num_kept = self._num_blocks * config.page_size
        self._manager = model.init_continuous_batching(settings, config, hints)
        if not is_named:
            take_pages(model)
        if has_graphs:
            _warm_up_decoding(self._manager, count)
        else:
            self._manager.warmup()

    def _longest(self, count: int, group: int) -> list[int]:
        """Return the lengths of the largest rollout of `count` prompts, each of them `group` times."""
        return [length for length in self._lengths[: -(-count // group)] for _ in range(group)]


def _num_blocks(config: ContinuousBatchingConfig) -> int:
    return config.num_blocks or 0


def _warm_up_decoding(manager: Any, num_prompts: int) -> None:  # Any: as above
    """Make the manager's cache and buffers, and a graph of the largest step: others find their memory in its.

    Only steps that decode are padded and get a graph. One of a whole batch of prompts is for a few steps of a rollout,
    and as wide as the mask: with such ones gpt-oss-20b took 12 GB more than without graphs.
    """
    manager.batch_processor = processor = manager._create_batch_processor()
    runner, cache = processor.model_runner, processor.cache
    most = min(cache.max_batch_tokens, _GRAPH_QUERIES * -(-num_prompts // _GRAPH_QUERIES))
    pad = runner.maybe_pad_inputs

    def pad_decoding(num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        runner.pad_inputs = runner.use_cuda_graph_varlen = num_q_tokens <= most
        return pad(num_q_tokens, max_kv_read, use_decode_fast_path)

    if runner.use_cuda_graph_varlen:  # there is a GPU
        runner.maybe_pad_inputs = pad_decoding
        num_keys = cache.num_blocks * manager.continuous_batching_config.page_size
        runner.run_one_warmup(manager.model, num_q_tokens=most, max_kv_read=num_keys)


def _complete(manager: Any, prompt_ids: Sequence[list[int]], step: int) -> list[Any]:  # Any: as above, its outputs
    """Run the engine until each prompt has its completion; its thread has ended when this returns or raises."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # its stream does not wait for that of the optimizer's last step
    manager.batch_processor.cache.reset()  # a prefix must not come with what older weights made of it
    manager.background_thread_status.clear()  # of the last rollout's end, or prompts are refused
    manager.current_batch = 0
    found: dict[str, Any] = {}  # Any: as above
    try:
        names = manager.add_requests(list(prompt_ids))  # all are there before the thread looks: it is never a race
        manager.start()
        num_batches = 0
        while len(found) < len(names):
            is_running = manager.is_running()  # asked first, so that what it leaves at its end is read
            if (output := manager.get_result(timeout=1)) is not None:
                found[output.request_id] = output
            elif not is_running:
                break
            if manager.current_batch > num_batches:  # an engine that hangs makes no progress
                num_batches = manager.current_batch
                lifeline.beat("rollout", step)
    finally:
        _stop(manager)
    _require_whole(found, names, manager.background_thread_status.fatal_error)
    return [found[name] for name in names]


def _stop(manager: Any) -> None:  # Any: as above
    """End the manager's thread and keep the rest.

    Its own `stop` lets that go, or hangs it on the model for whoever comes next, collects all garbage (0.3 s) and waits
    for its thread to look around (0.1 s).
    """
    status = manager.background_thread_status
    status.request_stop(status.HARD_STOP, manager.distributed_helper.global_rank)
    manager._wake_up_loop.set()
    manager.join(time.perf_counter())
    torch.cuda.empty_cache()  # of its stream, which the model that learns does not use; nothing without a GPU


def _require_whole(found: dict[str, Any], names: Sequence[str], fatal: Exception | None) -> None:  # Any: as above
    """Raise what ended the engine's thread, or RolloutError where a completion failed or is not there."""
    if isinstance(fatal, torch.OutOfMemoryError | MemoryError | RolloutError):
        raise fatal
    if fatal is not None:
        raise RolloutError(
            f"continuous batching failed ({fatal!r}): use rollouts='transformers' if it does so again"
        ) from fatal
    failed = [output.error for output in found.values() if output.error is not None]
    if failed or len(found) < len(names):
        missing = len(names) - len(found) + len(failed)
        raise RolloutError(
            f"{missing} of {len(names)} completions failed in continuous batching"
            f"{f': {failed[0]}' if failed else ''}: use rollouts='transformers' if it does so again"
        )


def require_pages(model: Any) -> None:  # Any: a PreTrainedModel
    """Raise RolloutError for a model that computes attention by itself, or keeps what has no pages."""
    trait = ""
    if not model._supports_attention_backend:
        trait = "computes its attention itself, which knows no pages"
    elif model._is_stateful:
        trait = "keeps states, which have no pages"
    elif found := trait_without_pages(model.config.to_dict()):  # what the base's config.json leaves to defaults
        trait = f"has {found}"
    if trait:
        raise RolloutError(
            f"ReinforceSpec.rollouts = 'continuous' with a {model.config.model_type}: transformers' "
            f"{type(model).__name__} {trait}; use 'transformers'"
        )


def sized_cache(
    lengths: Sequence[int],
    limit: int,
    *,
    is_named: bool = False,
    is_flash: bool = False,
    has_graphs: bool = False,
) -> ContinuousBatchingConfig:
    """Return settings whose cache holds this rollout and no more.

    By default it takes what memory is free, which learning needs.

    Args:
        lengths: tokens of each prompt.
        limit: tokens that are generated at most.
        is_named: by the flash attention of a package that the run names.
        is_flash: by that or torch's.
        has_graphs: with CUDA graphs, padded to few sizes.

    >>> config = sized_cache([10, 40], 30)
    >>> config.num_blocks, config.max_batch_tokens
    (7, 50)
    >>> [sized_cache([9000], 30, is_flash=is_flash).max_batch_tokens for is_flash in (False, True)]
    [1024, 8192]
    """
    page, most = _NAMED_PAGE if is_named else _PAGE, _FLASH_BATCH if is_flash else _PLAIN_BATCH
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=sum(-(-(length + limit) // page) + 1 for length in lengths),
        max_batch_tokens=max(len(lengths), min(most, sum(lengths))),
        return_logprobs=True,
        auto_switch_to_flash=False,
        max_blocks_per_request=None if is_named else 0,  # tables of blocks are for kernels of others
    )
    if has_graphs:
        config.use_cuda_graph = (True, False)
        config.q_padding_interval_size, config.kv_padding_interval_size = _GRAPH_QUERIES, _GRAPH_KEYS
    return config
