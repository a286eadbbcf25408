"""A 2-layer, 4-expert gpt-oss and a byte tokenizer, made in memory: real classes, tiny sizes."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from tasks.artifacts import ArtifactStore, BaseCheckpoint
from tasks.fetch.run import fetch_base
from tasks.gptoss.layout import config_values
from tasks.specs import BaseModelSpec, GptOssShape

SHAPE = GptOssShape(
    num_layers=2,
    hidden_size=32,
    intermediate_size=32,
    num_experts=4,
    experts_per_token=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=262,
    sliding_window=8,
    context_tokens=512,
    initial_context_tokens=256,
)
SPECIALS = ("<|end|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|pad|>")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and six special tokens, with a template in harmony's form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|return|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int = 0, head_dim: int = SHAPE.head_dim) -> GptOssForCausalLM:
    """A random gpt-oss in float32 whose biases and sinks are not zero. vLLM on a CPU wants heads of 32 and more."""
    import torch

    torch.manual_seed(seed)
    config = GptOssConfig(**{**config_values(SHAPE), "head_dim": head_dim}, eos_token_id=257, pad_token_id=261)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.05)
    return model.eval()


def save_model(folder: Path, seed: int = 0, shard_size: str = "5GB") -> Path:
    """Save a random tiny model with its tokenizer."""
    make_model(seed).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_base(store: ArtifactStore, folder: Path) -> BaseCheckpoint:
    """A committed base artifact of a tiny model in `folder`."""
    from huggingface_hub import HfApi

    return fetch_base(BaseModelSpec(model=str(save_model(folder))), store, HfApi(token=False))


def save_dense_model(folder: Path) -> Path:
    """Save a random dense model of two layers with the same tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        **sizes,
        vocab_size=262,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=257,
        pad_token_id=261,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int) -> Path:
    """Write `count` short single-turn chats as JSONL."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}?"}, {"role": "assistant", "content": f"answer {i * 7 % 13}"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
