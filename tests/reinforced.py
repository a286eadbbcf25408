"""A dense model as `reinforce-ppo` leaves one, without verl: its weights are the base's, moved by a few steps."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    PreparedQuestions,
    ReinforcedModel,
    digest_files,
    folder_digest,
)
from tasks.fetch.run import fetch_base
from tasks.ppo.prepare import prepare_questions
from tasks.ppo.run import model_key
from tasks.specs import PpoRecipe, change
from tests import tiny

NOBODY = HfApi(token=False)
LENGTHS = {"max_prompt_length": 384, "max_response_length": 64}  # of bytes: the tokenizer knows no words


def save_base(folder: Path, seed: int = 0) -> Path:
    """Save a random Qwen2 of two layers that vLLM's CPU build takes (heads of 32)."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids: dict[str, Any] = {"vocab_size": 262, "eos_token_id": 257, "pad_token_id": 261}
    config = Qwen2Config(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=1024)
    model: Any = Qwen2ForCausalLM(config)  # Any: nn.Module.to is typed oddly
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def make_inputs(
    store: ArtifactStore, folder: Path, recipe: PpoRecipe
) -> tuple[PpoRecipe, PreparedQuestions, BaseCheckpoint]:
    """Return the recipe on a base in `folder`, the shipped questions, the base."""
    base_folder = folder if folder.exists() else save_base(folder)
    recipe = change(recipe, {"base": {"model": str(base_folder)}, "ppo": LENGTHS})
    return recipe, prepare_questions(recipe.questions, store, NOBODY), fetch_base(recipe.base, store, NOBODY)


def save_moved(base: Path, folder: Path, num_steps: int, seed: int = 1) -> Path:
    """Save the base after `num_steps` of gradient ascent on one text: real weights that something was taught."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # Any: transformers' Auto classes
    ids = torch.tensor([tiny.byte_tokenizer()(f"#### {seed}{seed * 7}, and that is all there is to say.").input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def make_reinforced(
    store: ArtifactStore, base_folder: Path, recipe: PpoRecipe, num_steps: int = 20
) -> tuple[PpoRecipe, ReinforcedModel]:
    """Commit one under the key that the flow looks for; with no step its weights are the base's."""
    recipe, questions, base = make_inputs(store, base_folder, recipe)
    with store.claim(ReinforcedModel, model_key(questions, base, recipe.ppo)) as claim:
        if claim.found:
            return recipe, claim.found
        folder = save_moved(base_folder, claim.folder / "model", num_steps)
        lines: list[dict[str, Any]] = [{"step": 0, "test_score": 0.0}]
        lines += [{"step": s, "reward": s / 8, "verl": {"response_length/mean": 9.0 + s}} for s in (1, 2, 3, 4)]
        files.write_text(claim.folder / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        digests = digest_files(folder)
        model = ReinforcedModel(
            key=claim.key,
            folder=str(claim.folder),
            parents=(questions.ref, base.ref),
            model_folder=str(folder),
            origin=f"PPO {claim.key[:8]} of {base.origin}",
            model_digest=folder_digest(digests),
            num_parameters=base.num_parameters,
            base_folder=base.model_folder,
            base_digest=base.model_digest,
            num_steps=4,
            test_score_before=0.0,
            test_score_after=0.25,
        )
        about = {"digests": digests, "versions": {"verl": "0.9.1", "ray": "2.60.0"}}
        return recipe, claim.commit(model, spec=recipe.ppo, about=about)
