"""Score validation answers with transformers, from model folders: the yardstick for the served model.

    python -m tasks.verify.reference job.json       a process of its own, so that its memory goes away

    merged, base      from their files
    tuned             the base with the adapter, merged in memory by PEFT: other code than ours, from what was trained
    base              of a pretrained model: random weights of the same config and seed, which nothing was taught
    greedy            transformers' greedy answers to the first prompts, with each token's lead over the next best

Ring: edge.  Units: nats.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import files
from tasks.models import dequantized

Document = dict[str, Any]
Model = Any  # transformers' and PEFT's models share no useful base class


def load_model(folder: Path, dtype: str) -> Model:
    """Open a model folder for scoring."""
    config = AutoConfig.from_pretrained(folder)
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"  # the reference arithmetic; sinks need it
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if getattr(config, "quantization_config", None):
        kwargs["quantization_config"] = dequantized(config.quantization_config)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def make_untrained(folder: Path, dtype: str, seed: int) -> Model:
    """Return a model of the folder's config whose weights are as random as those that its training began with."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def score_documents(model: Model, documents: list[Document]) -> list[float]:
    """Return log p(token | before) of every answer token of every document."""
    values: list[float] = []
    for document in documents:
        values.extend(score(model, document["prompt_ids"], document["answer_ids"]))
    return values


@torch.no_grad()
def score(model: Model, prompt_ids: list[int], answer_ids: list[int]) -> list[float]:
    """Return log p of each answer token; logits exist for the answer's positions only."""
    ids_1T = torch.tensor([prompt_ids + answer_ids], device=model.device)
    logits_AV = model(input_ids=ids_1T, logits_to_keep=len(answer_ids) + 1).logits[0, :-1].float()
    wanted_A = ids_1T[0, len(prompt_ids) :]
    return logits_AV.log_softmax(-1).gather(1, wanted_A[:, None])[:, 0].tolist()


@torch.no_grad()
def answer_greedily(model: Model, prompt_ids: list[int], num_tokens: int) -> list[dict[str, float]]:
    """Return the greedy answer as GreedyStep's fields; it ends with the model's end token or after `num_tokens`."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    steps: list[dict[str, float]] = []
    kept: dict[str, Any] = {"use_cache": True}
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    while len(steps) < num_tokens:
        output = model(input_ids=ids_1T, logits_to_keep=1, **kept)
        (first, second), (token, other) = (pair.tolist() for pair in output.logits[0, -1].float().topk(2))
        steps.append({"token": token, "second": other, "lead": first - second})
        if token in ends:
            break
        kept["past_key_values"] = output.past_key_values
        ids_1T = torch.tensor([[token]], device=model.device)
    return steps


def tune(model: Model, adapter_folder: Path, stored: torch.dtype) -> Model:
    """Return the base with the adapter, merged by PEFT and rounded to what the merged files are stored in."""
    tuned = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()
    return tuned.to(stored).to(model.dtype).eval()


def compute(job: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
    """Return {"merged", "base", "tuned": log-probabilities, "greedy": answers}; one model is in memory at a time.

    Without an adapter in the job there is no "tuned".
    """
    documents, dtype = job["documents"], job["dtype"]
    model = load_model(Path(job["merged"]), dtype)
    scores: dict[str, Any] = {"merged": score_documents(model, documents)}  # Any: JSON values
    asked = documents[: job["num_greedy_prompts"]]
    scores["greedy"] = [answer_greedily(model, document["prompt_ids"], job["greedy_tokens"]) for document in asked]
    del model
    if "untrained_seed" in job:  # a model that was pretrained here
        model = make_untrained(Path(job["merged"]), dtype, job["untrained_seed"])
        return {**scores, "base": score_documents(model, documents)}
    model = load_model(Path(job["base"]), dtype)
    scores["base"] = score_documents(model, documents)
    if "adapter" not in job:  # a whole model that was trained with rewards
        return scores
    stored: Any = AutoConfig.from_pretrained(job["merged"]).dtype or torch.bfloat16  # Any: typed as str or dtype
    scores["tuned"] = score_documents(tune(model, Path(job["adapter"]), stored), documents)
    return scores


def main(path: Path) -> None:
    """Do what the job file asks for and write the result."""
    job = files.read_json(path)
    files.write_json(Path(job["result"]), compute(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
