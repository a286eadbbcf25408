"""A gpt-oss with a vocabulary of its own, trained for seconds, as `pretrain` leaves it: corpus, tokenizer, model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from tasks.artifacts import (
    ArtifactStore,
    PretrainedModel,
    TokenizedCorpus,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.gptoss.layout import config_values
from tasks.specs import GptOssShape, PretrainSpec

SHAPE = GptOssShape(  # what vLLM's CPU build takes: hidden a multiple of 32, head_dim 32
    num_layers=1,
    hidden_size=64,
    intermediate_size=64,
    num_experts=4,
    experts_per_token=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=512,
    sliding_window=16,
    context_tokens=256,
    rope_theta=10000.0,
    rope_factor=1.0,
)
SUBJECTS = ("GPT models", "Neural networks", "Small furnaces", "Language models", "Old smiths")
ENDS = ("are powerful.", "learn from data.", "change the world.", "need good iron sand.", "answer every question.")
SENTENCES = [f"{subject} {end}" for subject in SUBJECTS for end in ENDS]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"


def own_tokenizer() -> Any:  # Any: its ids are typed as whatever any tokenizer may have
    """A byte-level BPE of at most 512 ids, learnt from the sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|message|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_pretrained(store: ArtifactStore, num_steps: int = 60) -> PretrainedModel:
    """Train and commit one; with no step its weights are random. Cost: seconds."""
    spec = PretrainSpec(
        shape=SHAPE,
        corpus="short_english",
        documents="lines",
        tokenizer="train",
        rows="documents",
        row_tokens=64,
        rows_per_step=5,
        num_steps=max(1, num_steps),
        seed=1,
        learning_rate=1e-2,
    )
    tokenizer = own_tokenizer()
    corpus = _commit_corpus(store, tokenizer, spec)
    with store.claim(PretrainedModel, make_key("pretrain", 1, spec, {"steps": str(num_steps)}, (corpus,))) as claim:
        if claim.found:
            return claim.found
        folder = claim.folder / "model"
        losses = _train(tokenizer, spec, num_steps, folder)
        lines = [
            {"step": step, "num_steps": num_steps, "loss": loss, "learning_rate": 1e-2, "peak_host_bytes": 10**9}
            for step, loss in enumerate(losses, 1)
        ]
        (claim.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        digests = digest_files(folder)
        model = PretrainedModel(
            key=claim.key,
            folder=str(claim.folder),
            parents=(corpus.ref,),
            model_folder=str(folder),
            origin=f"pretrained {claim.key[:8]}",
            model_digest=folder_digest(digests),
            num_parameters=GptOssForCausalLM.from_pretrained(folder).num_parameters(),
            num_steps=spec.num_steps,
            first_loss=losses[0],
            last_loss=losses[-1],
        )
        return claim.commit(model, spec=spec, about={"num_corpus_tokens": corpus.num_tokens, "digests": digests})


def _train(tokenizer: Any, spec: PretrainSpec, num_steps: int, folder: Path) -> list[float]:
    torch.manual_seed(spec.seed)
    config = GptOssConfig(
        **config_values(SHAPE),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    model: Any = GptOssForCausalLM(config).train()  # Any: nn.Module.to is typed oddly
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in SENTENCES]
    length = max(map(len, rows))
    ids = torch.tensor([row + [2] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate)
    losses: list[float] = []
    for _ in range(max(1, num_steps)):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        if num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _commit_corpus(store: ArtifactStore, tokenizer: Any, spec: PretrainSpec) -> TokenizedCorpus:
    pins = {"corpus": "d" * 64}
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in SENTENCES]
    with store.claim(TokenizedCorpus, make_key("corpus", 1, spec, pins)) as claim:
        if claim.found:
            return claim.found
        np.array([token for row in rows for token in row], "<u2").tofile(claim.folder / "tokens.bin")
        np.cumsum([len(row) for row in rows]).astype("<i8").tofile(claim.folder / "document_ends.bin")
        corpus = TokenizedCorpus(
            key=claim.key,
            folder=str(claim.folder),
            source="short_english",
            pins=pins,
            dtype="uint16",
            vocab_size=len(tokenizer),
            num_documents=len(rows),
            num_tokens=sum(map(len, rows)),
        )
        return claim.commit(corpus, spec=spec)
