"""Continuous batching beside a plain forward pass: what is sampled, what is left behind, and how it fails."""

import gc
import threading
import time
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from tasks.errors import SpecError, TrainingError
from tasks.lifeline import lifeline
from tasks.reinforce.continuous import generate_continuously, require_pages
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
    return trainer_of(make_model() if request.param == "gpt-oss" else dense(), tmp_path)


@torch.no_grad()
def plainly(trainer: Any, prompt: list[int], said: list[int]) -> list[float]:
    """Log-probabilities of a completion by one forward pass over it alone."""
    ids = torch.tensor([[*prompt, *said]])
    logits = trainer.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / trainer.temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_what_was_sampled(trainer: Any, temperature: float):
    trainer.temperature = trainer.generation_config.temperature = temperature
    completions, logprobs = generate_continuously(trainer, PROMPTS * 3)
    for prompt, said, told in zip(PROMPTS * 3, completions, logprobs, strict=True):
        assert told == pytest.approx(plainly(trainer, prompt, said), abs=1e-4)
        assert not set(said[:-1]) & set(ENDS)  # of several ends the first one ends it, and is kept
        assert len(said) == 12 or (len(said) < 12 and said[-1] in ENDS)
    assert any(len(said) < 12 for said in completions)


def test_a_prompt_of_more_than_a_batch_and_more_prompts_than_one(trainer: Any):
    prompts = [[65] * 200, *([number % 200] for number in range(1100))]
    trainer.max_completion_length = trainer.generation_config.max_new_tokens = 1
    completions, logprobs = generate_continuously(trainer, prompts)
    assert [len(said) for said in completions] == [1] * len(prompts)
    assert logprobs[0] == pytest.approx(plainly(trainer, prompts[0], completions[0]), abs=1e-4)


def test_what_is_sampled_does_not_depend_on_who_was_slow(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    """The engine's thread must not see some of the prompts before the others are there: on a busy machine it did."""
    torch.manual_seed(2)
    quick = generate_continuously(trainer, PROMPTS)
    add = ContinuousBatchingManager.add_request

    def add_slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        added = add(self, *args, **kwargs)
        time.sleep(0.02)
        return added

    monkeypatch.setattr(ContinuousBatchingManager, "add_request", add_slowly)
    torch.manual_seed(2)
    assert generate_continuously(trainer, PROMPTS) == quick


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
    generate_continuously(trainer, PROMPTS)
    assert state() == before and threading.active_count() <= threads
    assert not live_caches()
    assert beats and set(beats) == {"rollout"}  # without one for stall_timeout_s the run is taken for hung


def live_caches() -> list[Any]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is PagedAttentionCache]


@pytest.mark.parametrize(
    ("thrown", "error", "says"),
    [
        (RuntimeError("no such kernel"), TrainingError, "no such kernel.*use rollouts='transformers'"),
        (AssertionError(), TrainingError, r"AssertionError\(\)"),  # without a word it passed for completions
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
    ids=["with-words", "without", "memory"],
)
def test_what_goes_wrong_in_the_engines_thread_is_raised_here(trainer: Any, thrown: Exception, error: Any, says: str):
    attention, calls = trainer.model.config._attn_implementation, iter(range(9))

    def fail(*args: Any) -> None:
        if next(calls) == 2:
            raise thrown

    hook = trainer.model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(error, match=says):
        generate_continuously(trainer, PROMPTS)
    hook.remove()
    assert trainer.model.config._attn_implementation == attention
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]
    assert all(len(said) for said in generate_continuously(trainer, PROMPTS)[0])


def test_a_model_that_knows_no_pages_is_refused():
    with torch.device("meta"):
        falcon = FalconForCausalLM(FalconConfig(num_hidden_layers=1))
    with pytest.raises(SpecError, match=r"falcon: transformers' FalconForCausalLM .*use 'transformers'"):
        require_pages(falcon)
    require_pages(dense())
