"""Continuous batching beside a plain forward pass: what is sampled, what is kept and left behind, how it fails."""

import gc
import logging
import threading
import time
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    Gemma4TextConfig,
    Llama4TextConfig,
    NemotronConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
)
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    PagedAttentionCache,
    initialization,
    model_runner,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from tasks.errors import RolloutError
from tasks.lifeline import lifeline
from tasks.reinforce import continuous
from tasks.reinforce.continuous import ContinuousEngine, require_pages
from tasks.reinforce.pages import attend_over_pages
from tests.tiny import byte_tokenizer, make_model

pytestmark = pytest.mark.long

ENDS = [*range(220, 256), 257]  # many, so that some completions end
PROMPTS = [[65 + number] * length for number, length in enumerate((1, 5, 32, 33, 64, 9, 9, 9))]


def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=262, attn_implementation="sdpa"))


def trainer_of(model: Any, folder: Any, temperature: float = 1.0, limit: int = 12) -> Any:
    """TRL's trainer of a model with a random adapter, whose head prefers some tokens."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.generation_config.eos_token_id = ENDS
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_completion_length=limit,
        temperature=temperature,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=lambda **kwargs: [0.0],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    )
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    trainer.model.train()
    return trainer


@pytest.fixture(params=["gpt-oss", "dense"])
def trainer(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    return trainer_of(dense() if request.param == "dense" else make_model(), tmp_path)


def generate_anew(trainer: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """By an engine that is not kept."""
    engine = ContinuousEngine()
    try:
        return engine.generate(trainer, prompts)
    finally:
        engine.drop()


@torch.no_grad()
def plainly(trainer: Any, prompt: list[int], said: list[int]) -> list[float]:
    """Log-probabilities of a completion by one forward pass over it alone."""
    ids = torch.tensor([[*prompt, *said]])
    logits = trainer.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / trainer.temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_what_was_sampled(trainer: Any, temperature: float):
    trainer.temperature = trainer.generation_config.temperature = temperature
    completions, logprobs = generate_anew(trainer, PROMPTS * 3)
    for prompt, said, told in zip(PROMPTS * 3, completions, logprobs, strict=True):
        assert told == pytest.approx(plainly(trainer, prompt, said), abs=1e-4)
        assert not set(said[:-1]) & set(ENDS)  # of several ends the first one ends it, and is kept
        assert len(said) == 12 or (len(said) < 12 and said[-1] in ENDS)
    assert any(len(said) < 12 for said in completions)


def test_a_prompt_of_more_than_a_batch_and_more_prompts_than_one(trainer: Any):
    prompts = [[65] * 200, *([number % 200] for number in range(1100))]
    trainer.max_completion_length = trainer.generation_config.max_new_tokens = 1
    completions, logprobs = generate_anew(trainer, prompts)
    assert [len(said) for said in completions] == [1] * len(prompts)
    assert logprobs[0] == pytest.approx(plainly(trainer, prompts[0], completions[0]), abs=1e-4)


def test_what_is_sampled_does_not_depend_on_who_was_slow(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    """The engine's thread must not see some of the prompts before the others are there: on a busy machine it did."""
    torch.manual_seed(2)
    quick = generate_anew(trainer, PROMPTS)
    add = ContinuousBatchingManager.add_request

    def add_slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        added = add(self, *args, **kwargs)
        time.sleep(0.02)
        return added

    monkeypatch.setattr(ContinuousBatchingManager, "add_request", add_slowly)
    torch.manual_seed(2)
    assert generate_anew(trainer, PROMPTS) == quick


def test_nothing_is_left_behind(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    def state() -> tuple[Any, ...]:
        model = trainer.model
        weights = [(name, each.dtype, each.requires_grad, each.sum().item()) for name, each in model.named_parameters()]
        modes = [module.training for module in model.modules()]
        configs = [each.to_dict() for each in (model.config, model.generation_config, trainer.generation_config)]
        return weights, modes, configs, model.config._attn_implementation, torch.is_grad_enabled()

    beats: list[str] = []
    monkeypatch.setattr(lifeline, "beat", lambda phase, step: beats.append(phase))
    before, threads = state(), threading.active_count()
    generate_anew(trainer, PROMPTS)
    assert state() == before and threading.active_count() <= threads
    assert not live_caches()
    assert beats and set(beats) == {"rollout"}  # without one for stall_timeout_s the run is taken for hung


ROLLOUTS = [[[65 + number] * length for number in range(8)] for length in (70, 3, 100, 40)]  # 32 tokens are a page


def learn(trainer: Any) -> None:
    """Change the adapter in place, as an optimizer does."""
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight), alpha=0.2)


def test_a_kept_engine_says_what_a_new_one_does_while_weights_and_lengths_change(trainer: Any):
    engine, kept = ContinuousEngine([100] * 8), set()
    for number, prompts in enumerate([ROLLOUTS[0], *ROLLOUTS]):  # the first prompts twice: their prefixes are known
        learn(trainer)
        torch.manual_seed(number)
        completions, logprobs = engine.generate(trainer, prompts)
        state = torch.get_rng_state()
        kept |= {id(cache) for cache in live_caches()}
        torch.manual_seed(number)
        other = ContinuousEngine([100] * 8)
        assert other.generate(trainer, prompts) == (completions, logprobs)  # of a run that was resumed here
        other.drop()
        assert torch.equal(torch.get_rng_state(), state)
        for prompt, said, told in zip(prompts, completions, logprobs, strict=True):
            assert told == pytest.approx(plainly(trainer, prompt, said), abs=1e-4)
        assert {id(cache) for cache in live_caches()} == kept and len(kept) == 1
    assert trainer.model.config._attn_implementation in ("eager", "sdpa") and trainer.model.training
    engine.drop()
    assert not live_caches()


class Replay:
    """Stands for a CUDA graph: the same Python with the same tensors, whatever is in them by then."""

    def __init__(self, forward: Any, arguments: Any) -> None:
        self.forward, self.arguments, self.count = forward, arguments, 0

    def replay(self) -> None:
        self.count += 1
        self.forward(*self.arguments)

    def reset(self) -> None:
        del self.forward, self.arguments


def test_graphs_of_steps_that_decode_are_kept_and_say_the_same(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    def capture(self: Any, forward: Any, stream: Any, *arguments: Any) -> None:
        forward(*arguments)
        self.inputs_and_outputs.set_graph(Replay(forward, arguments))

    monkeypatch.setattr(continuous, "has_flash", lambda model: True)
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "CUDAGraph")
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graph", capture)
    engine, num_decoded = ContinuousEngine([100] * 8), 0
    engine._has_graphs = True
    for number, prompts in enumerate([*ROLLOUTS, ROLLOUTS[0]]):
        learn(trainer)
        torch.manual_seed(number)
        completions, logprobs = engine.generate(trainer, prompts)
        for prompt, said, told in zip(prompts, completions, logprobs, strict=True):
            assert told == pytest.approx(plainly(trainer, prompt, said), abs=1e-4)
        other = ContinuousEngine([100] * 8)
        other._has_graphs = True
        torch.manual_seed(number)
        assert other.generate(trainer, prompts) == (completions, logprobs)
        other.drop()
        graphs = engine._manager.batch_processor.inputs_and_outputs.graphs._storage
        assert {key[0] for key in graphs} == {32} and len(graphs) == 2  # the largest step's, and that of all others
        num_decoded += max(map(len, completions)) - 1
        assert max(graph.count for graph in graphs.values()) >= num_decoded - 2
    del graphs
    engine.drop()
    assert not live_caches()


def test_an_engine_that_was_told_too_little_is_made_anew_for_what_is_longer(trainer: Any):
    engine = ContinuousEngine()
    engine.generate(trainer, ROLLOUTS[1])
    small = live_caches()[0].num_blocks
    assert all(len(said) for said in engine.generate(trainer, ROLLOUTS[0])[0])
    [cache] = live_caches()
    assert cache.num_blocks > small
    engine.drop()


@pytest.mark.parametrize(("lengths", "pages"), [([5, 300, 200, 7], 4 * (10 + 1) + 4 * (7 + 1)), ([5], 8 * 3)])
def test_its_cache_holds_the_longest_prompts_of_the_run_each_for_its_group(
    trainer: Any, lengths: list[int], pages: int
):
    trainer.num_generations = 4
    engine = ContinuousEngine(lengths)
    engine.generate(trainer, [[65] * 40] * 8)
    [cache] = live_caches()
    assert cache.num_blocks == pages
    engine.drop()


def test_a_cache_too_large_to_lie_beside_what_learns_is_not_kept(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    kept, dropped = ContinuousEngine([100] * 8), ContinuousEngine([100] * 8)
    for number in range(2):
        torch.manual_seed(number)
        expected = kept.generate(trainer, ROLLOUTS[number])
        [cache] = live_caches()
        with monkeypatch.context() as patch:
            patch.setattr(continuous, "_MOST_KEPT", cache.num_blocks * 32 - 1)
            torch.manual_seed(number)
            assert dropped.generate(trainer, ROLLOUTS[number]) == expected
        assert [id(each) for each in live_caches()] == [id(cache)]
    kept.drop()


def test_a_stop_amid_a_rollout_drops_it(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    engine = ContinuousEngine([100])
    engine.generate(trainer, PROMPTS)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ContinuousBatchingManager, "get_result", stop)
        engine.generate(trainer, PROMPTS)
    assert not live_caches() and trainer.model.training
    assert all(len(said) for said in engine.generate(trainer, PROMPTS)[0])
    engine.drop()


def live_caches() -> list[Any]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is PagedAttentionCache]


@pytest.mark.parametrize(
    ("thrown", "error", "says"),
    [
        (RuntimeError("no such kernel"), RolloutError, "no such kernel.*use rollouts='transformers'"),
        (AssertionError(), RolloutError, r"AssertionError\(\)"),  # without a word it passed for completions
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
    ids=["with-words", "without", "memory"],
)
def test_what_goes_wrong_in_the_engines_thread_is_raised_here(
    trainer: Any, thrown: Exception, error: Any, says: str, monkeypatch: pytest.MonkeyPatch
):
    attention, calls = trainer.model.config._attn_implementation, iter(range(9))
    monkeypatch.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)  # pytest keeps its records

    def fail(*args: Any) -> None:
        if next(calls) == 2:
            raise thrown

    engine = ContinuousEngine()
    engine.generate(trainer, PROMPTS)
    hook = trainer.model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(error, match=says):
        engine.generate(trainer, PROMPTS)
    hook.remove()
    assert not live_caches()
    assert trainer.model.config._attn_implementation == attention
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]
    assert all(len(said) for said in generate_anew(trainer, PROMPTS)[0])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (FalconConfig(num_hidden_layers=1), "falcon: transformers' FalconForCausalLM computes its attention itself"),
        (RecurrentGemmaConfig(num_hidden_layers=1), "RecurrentGemmaForCausalLM keeps states"),
        # its layers' kinds are in no config.json
        (Llama4TextConfig(num_hidden_layers=4, num_local_experts=1), "has layers of chunked_attention"),
    ],
)
def test_a_model_that_knows_no_pages_is_refused(config: Any, says: str):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RolloutError, match=f"{says}.*use 'transformers'"):
        require_pages(model)
    require_pages(dense())


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 262,
}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (DiffLlamaConfig(**SIZES), "DiffLlamaAttention wants keys of layer 0 behind those of 0, of 2 layers"),
        (DogeConfig(**SIZES, keep_window_size=8), "DogeAttention wants a mask of its own"),
        (PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=16), "wants a window of None where 16 are kept"),
        (NemotronConfig(**SIZES), "NemotronAttention wants no cache"),
        (Gemma4TextConfig(**SIZES, vocab_size_per_layer_input=262), "could not start for a gemma4_text.*head_dim"),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_a_family_whose_tokens_would_be_another_models_ends_it_so_that_auto_goes_on(
    config: Any, says: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """Each said other tokens than its own without a word, or ended in what `auto` does not take for the engine's."""
    monkeypatch.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)
    torch.manual_seed(0)
    trainer = trainer_of(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), tmp_path)
    with pytest.raises(RolloutError, match=f"{says}.*use rollouts='transformers'"):
        generate_anew(trainer, PROMPTS)
    assert trainer.model.config._attn_implementation == "sdpa" and trainer.model.training


@pytest.mark.parametrize("wanted", [{"softcap": 50.0}, {"is_causal": False}])
def test_what_else_a_model_wants_of_its_attention_is_not_left_out_without_a_word(wanted: dict[str, Any]):
    one = torch.zeros(1, 1, 1, 8)
    with pytest.raises(RolloutError, match=f"wants {next(iter(wanted))}.* use rollouts='transformers'"):
        attend_over_pages(torch.nn.Module(), one, one, one, None, **wanted)
