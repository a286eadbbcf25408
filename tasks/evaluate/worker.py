"""Ask a model folder with transformers, in a process of its own, so that its memory goes away.

    python -m tasks.evaluate.worker job.json       items -> asked.json

Ring: edge.  Shapes: C continuations, T tokens, V vocabulary.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import files
from tasks.evaluate.measure import ask
from tasks.models import dequantized


class FilesModel:
    """A model folder in this process's memory."""

    at_once = 1

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        attention = "eager" if config.model_type == "gpt_oss" else "sdpa"  # as verify's reference: sinks need it
        kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        if getattr(config, "quantization_config", None):
            kwargs["quantization_config"] = dequantized(config.quantization_config)
        if device != "cpu":
            kwargs["device_map"] = device
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()  # Any: one class per family

    @torch.no_grad()
    def score(self, prompt_ids: list[int], continuations: list[list[int]]) -> list[list[float]]:
        """Return log p of each token. Pads stand behind, where a causal model's earlier tokens don't see them."""
        longest = max(map(len, continuations))
        ids_CT = torch.tensor([[*prompt_ids, *ids, *[0] * (longest - len(ids))] for ids in continuations])
        ids_CT = ids_CT.to(self._model.device)
        logits_CTV = self._model(input_ids=ids_CT, logits_to_keep=longest + 1).logits[:, :-1].float()
        wanted_CT = ids_CT[:, len(prompt_ids) :]
        picked_CT = logits_CTV.log_softmax(-1).gather(2, wanted_CT[..., None])[..., 0]
        return [row[: len(ids)] for row, ids in zip(picked_CT.tolist(), continuations, strict=True)]

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], max_tokens: int, stop_ids: list[int]) -> list[int]:
        """Return the greedy continuation."""
        ids_1T, cache = torch.tensor([prompt_ids], device=self._model.device), None
        said: list[int] = []
        while len(said) < max_tokens:
            step = self._model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            said.append(int(step.logits[0, -1].argmax()))
            if said[-1] in stop_ids:
                break
            ids_1T = torch.tensor([said[-1:]], device=self._model.device)
        return said


def main(path: Path) -> None:
    """Answer the job's items and write what was answered."""
    job = files.read_json(path)
    model = FilesModel(Path(job["folder"]), job["dtype"], job["device"])
    files.write_json(Path(job["result"]), ask(model, job["items"], job["max_tokens"], job["stop_ids"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
