"""The model itself: transformers' own `generate`, told to stop between two tokens.

    LiteModel.load() -> prompt_ids(wish) -> say(ids, wish, on_token, is_wanted) -> how it ended

Ring: edge (disk, the Hub, torch).  Units: tokens.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deployments.lite.asked import COMPLETIONS, AskError, Wish, read_wish
from deployments.lite.said import HARMONY, Said


class _Tokens(BaseStreamer):
    """Hands each token on as it comes."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # generate shows the prompt first
            self._is_prompt = False
        else:
            self._take(int(value.reshape(-1)[-1]))

    def end(self) -> None:
        pass


class _Unwanted(StoppingCriteria):
    """Ends the generation when nobody wants more of it."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self._is_wanted = is_wanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]  # Any: generate's own
        return torch.full((input_ids.shape[0],), not self._is_wanted(), dtype=torch.bool)


class LiteModel:
    """A causal language model on the CPU. One answer at a time: seeds are torch's global ones."""

    def __init__(self, model: Any, tokenizer: Any) -> None:  # Any: transformers' classes are chosen by the files
        self._model = model
        self._tokenizer = tokenizer
        self._specials: dict[int, str] = {
            token: str(tokenizer.convert_ids_to_tokens(token)) for token in _special_ids(tokenizer)
        }
        self._is_harmony = set(self._specials.values()) >= HARMONY
        ends = model.generation_config.eos_token_id
        self._ends: set[int] = {ends} if isinstance(ends, int) else set(ends or ())
        if isinstance(tokenizer.eos_token_id, int):
            self._ends.add(tokenizer.eos_token_id)
        self._pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else min(self._ends, default=0)
        self.context = int(getattr(model.config, "max_position_embeddings", 0)) or 4096

    @classmethod
    def load(cls, source: str, num_threads: int) -> "LiteModel":
        """Read a folder in Hugging Face's layout, or `owner/name[@revision]` from the Hub."""
        torch.set_num_threads(num_threads)
        name, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")  # noqa: PTH112 - light
        more = {"revision": revision} if revision else {}
        tokenizer = AutoTokenizer.from_pretrained(name, **more)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **more)
        return cls(model.eval(), tokenizer)

    def warm_up(self) -> None:
        """Say one token: the first call loads more of torch, for seconds."""
        wish = read_wish(COMPLETIONS, {"prompt": [0], "max_tokens": 1, "temperature": 0})
        self.say([0], wish, lambda part, text: None, lambda: True)

    def prompt_ids(self, wish: Wish) -> list[int]:
        """Return the prompt's tokens. Raises AskError when it leaves no place for an answer."""
        if isinstance(wish.prompt, list):
            ids = wish.prompt
            if max(ids) >= self._model.config.vocab_size:
                raise AskError(f"token id {max(ids)} is beyond the model's {self._model.config.vocab_size}")
        elif wish.messages is None:
            ids = list(self._tokenizer(wish.prompt)["input_ids"])
        elif not self._tokenizer.chat_template:
            raise AskError("the lite model has no chat template: ask /v1/completions")
        else:
            effort = {"reasoning_effort": wish.effort} if wish.effort else {}
            made = self._tokenizer.apply_chat_template(
                wish.messages, add_generation_prompt=True, tokenize=True, return_dict=True, **effort
            )
            ids = list(made["input_ids"])
        if not ids or len(ids) >= self.context:
            raise AskError(f"the prompt has {len(ids)} tokens, expected 1 to {self.context - 1}")
        return ids

    def say(
        self, ids: Sequence[int], wish: Wish, show: Callable[[str, str], None], is_wanted: Callable[[], bool]
    ) -> tuple[str, int]:
        """Generate; `show` gets each piece as it is whole. Return the finish reason and the number of tokens."""
        said = Said(self._decode, self._specials, wish.stop, harmony=self._is_harmony and wish.messages is not None)
        tokens: list[int] = []

        def take(token: int) -> None:
            tokens.append(token)
            for part, text in said.add(token):
                show(part, text)

        own = self._model.generation_config
        temperature = wish.temperature if wish.temperature is not None else (own.temperature or 1.0)
        warm = {"temperature": temperature, "top_p": wish.top_p if wish.top_p is not None else own.top_p}
        torch.manual_seed(wish.seed) if wish.seed is not None else torch.seed()
        with torch.inference_mode():
            self._model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                max_new_tokens=min(wish.max_tokens, self.context - len(ids)),
                do_sample=temperature > 0,
                **(warm if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}),
                eos_token_id=sorted(self._ends) or None,
                pad_token_id=self._pad,
                streamer=_Tokens(take),
                stopping_criteria=StoppingCriteriaList([_Unwanted(lambda: is_wanted() and not said.stopped)]),
            )
        for part, text in said.end():
            show(part, text)
        ended = said.stopped or bool(tokens and tokens[-1] in self._ends)
        return "stop" if ended else "length", len(tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> list[int]:  # Any: as above
    """All special tokens, also those that the tokenizer's configuration does not list as such."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return sorted(added | set(tokenizer.all_special_ids))
