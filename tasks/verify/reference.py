"""Score validation answers with transformers, from model folders: the yardstick for the served model.

    python -m tasks.verify.reference job.json       a process of its own, so that its memory goes away

Ring: edge.  Units: nats.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import files
from tasks.models import dequantized

Document = dict[str, Any]


def score_folder(folder: Path, documents: list[Document], dtype: str) -> list[float]:
    """Return log p(token | before) of every answer token of every document."""
    config = AutoConfig.from_pretrained(folder)
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"  # the reference arithmetic; sinks need it
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if getattr(config, "quantization_config", None):
        kwargs["quantization_config"] = dequantized(config.quantization_config)
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    values: list[float] = []
    for document in documents:
        values.extend(score(model, document["prompt_ids"], document["answer_ids"]))
    return values


@torch.no_grad()
def score(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> list[float]:  # Any: see above
    """Return log p of each answer token; logits exist for the answer's positions only."""
    ids_1T = torch.tensor([prompt_ids + answer_ids], device=model.device)
    logits_AV = model(input_ids=ids_1T, logits_to_keep=len(answer_ids) + 1).logits[0, :-1].float()
    wanted_A = ids_1T[0, len(prompt_ids) :]
    return logits_AV.log_softmax(-1).gather(1, wanted_A[:, None])[:, 0].tolist()


def main(path: Path) -> None:
    """Score the folders that the job names and write the log-probabilities of each."""
    job = files.read_json(path)
    scores = {
        name: score_folder(Path(folder), job["documents"], job["dtype"]) for name, folder in job["folders"].items()
    }
    files.write_json(Path(job["result"]), scores)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
