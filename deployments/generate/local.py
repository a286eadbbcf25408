"""Generate from a model's files, by transformers' own `generate`, on the GPU or the CPU.

Ring: edge (torch, disk, the Hub).  Units: tokens, seconds.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from deployments.generate.memory import Memory
from deployments.generate.wish import Told, Wish
from deployments.lite.said import HARMONY, Piece, Said
from tasks import files
from tasks.environment import read_secret
from tasks.errors import MissingError, SpecError
from tasks.models import dequantized
from tasks.pictures import memory_curve


class _Streamer(TextIteratorStreamer):
    """Hands characters on as they are whole, and counts the tokens behind them.

    transformers' own waits for a space, which Japanese has not.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:  # Any: one class per family
        super().__init__(tokenizer)
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        specials = {
            token: str(tokenizer.convert_ids_to_tokens(token)) for token in {*added, *tokenizer.all_special_ids}
        }
        is_harmony = chat and set(specials.values()) >= HARMONY
        self._said = Said(self._decode, specials, (), harmony=is_harmony)
        self._part = ""
        self._is_prompt = True
        self.tokens: list[int] = []
        self.start, self.first_s = time.monotonic(), 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then token after token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.first_s = self.first_s or time.monotonic() - self.start
        self.tokens.append(int(value.reshape(-1)[-1]))
        self._show(self._said.add(self.tokens[-1]))

    def end(self) -> None:
        """Hand on what was held back."""
        self._show(self._said.end())
        self.on_finalized_text("", stream_end=True)

    def _show(self, pieces: list[Piece]) -> None:
        for part, text in pieces:
            gap = "\n\n" if self._part and part != self._part else ""  # between reasoning and answer
            self._part = part
            self.on_finalized_text(gap + text)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class _Unwanted(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]  # Any: generate's own
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def say(place: str, wish: Wish, told: Told, picture: Path | None = None) -> Iterator[str]:
    """Yield the answer's text as it comes; `told` is filled at the end.

    Args:
        place: folder or Hub id.
        wish: what to say and how.
        told: takes the figures.
        picture: where the memory over the generation is drawn.
    Raises: MissingError (no tokenizer, no GPU), SpecError (no chat template, prompt and answer beyond the context).
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    device = _choose_device(wish.device)
    config = _load_config(place)
    tokenizer = _load_tokenizer(place)
    ids = _prompt_ids(tokenizer, wish, place)
    _require_context(config, len(ids), wish)
    with Memory(on_gpu=device == "cuda", keep=picture is not None) as memory:
        model = _load_model(place, config, wish.dtype).to(device)
        yield from _generate(model, tokenizer, ids, wish, told)
    told.where, told.peak_bytes = "GPU" if memory.on_gpu else "host", memory.peak_bytes
    if picture:
        title = f"Inference, {len(ids)} + {told.num_tokens} tokens"
        files.write_bytes(picture, memory_curve(memory.records, title, total_bytes=memory.total_bytes))


def _generate(model: Any, tokenizer: Any, ids: list[int], wish: Wish, told: Told) -> Iterator[str]:  # Any: families
    ends = _ends(model, tokenizer)
    streamer, unwanted = _Streamer(tokenizer, chat=wish.chat), _Unwanted()
    ids_1T = torch.tensor([ids], device=model.device)
    torch.manual_seed(wish.seed) if wish.seed is not None else torch.seed()
    warm = {"temperature": wish.temperature, "top_p": wish.top_p, "top_k": 0}
    options: dict[str, Any] = {  # Any: arguments of many types
        "attention_mask": torch.ones_like(ids_1T),
        "max_new_tokens": wish.max_tokens,
        "do_sample": wish.temperature > 0,
        **(warm if wish.temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}),
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0),
        "streamer": streamer,
        "stopping_criteria": StoppingCriteriaList([unwanted]),
    }
    faults: list[Exception] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(ids_1T, **options)
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that waits for the text
            faults.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    streamer.start = time.monotonic()
    thread.start()
    try:
        yield from streamer
    finally:
        unwanted.event.set()  # Ctrl-C, a closed pipe: end between two tokens, not inside torch
        thread.join()
    if faults:
        raise faults[0]
    told.num_prompt_tokens, told.num_tokens = len(ids), len(streamer.tokens)
    told.seconds, told.first_token_s = time.monotonic() - streamer.start, streamer.first_s
    told.stopped_by = "eos" if streamer.tokens and streamer.tokens[-1] in ends else "length"


def _choose_device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingError("--device cuda, but torch sees no GPU here: leave it out, or look at nvidia-smi")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _token() -> str | None:
    return read_secret(os.environ, "HF_TOKEN") or None


def _load_config(place: str) -> Any:  # Any: transformers' configs
    try:
        return AutoConfig.from_pretrained(place, token=_token())
    except (OSError, ValueError) as error:
        raise MissingError(f"the model {place} can't be opened ({error})") from error


def _load_tokenizer(place: str) -> Any:  # Any: one class per family
    try:
        return AutoTokenizer.from_pretrained(place, token=_token())
    except (OSError, ValueError, KeyError) as error:  # what transformers raises when the files are not there
        raise MissingError(f"{place} has no tokenizer that transformers can open ({error})") from error


def _prompt_ids(tokenizer: Any, wish: Wish, place: str) -> list[int]:  # Any: see _load_tokenizer
    if wish.chat:
        if not tokenizer.chat_template:
            raise SpecError(f"the tokenizer of {place} has no chat template: leave --chat out")
        messages = [{"role": "user", "content": wish.prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(wish.prompt)["input_ids"]
    if not ids:
        raise SpecError(f"--prompt {wish.prompt!r} is no token of {place}'s tokenizer: say more")
    return list(ids)


def _require_context(config: Any, num_prompt: int, wish: Wish) -> None:  # Any: transformers' configs
    context = getattr(config, "max_position_embeddings", 0)
    if context and num_prompt + wish.max_tokens > context:
        raise SpecError(
            f"the prompt has {num_prompt} tokens and --max-tokens is {wish.max_tokens}, but the model's context holds "
            f"{context}: shorten the prompt, or ask for {max(0, context - num_prompt)} at most"
        )


def _load_model(place: str, config: Any, dtype: str) -> Any:  # Any: families
    more: dict[str, Any] = {}  # Any: a quantisation config
    if stored := getattr(config, "quantization_config", None):
        more["quantization_config"] = dequantized(stored)
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, token=_token(), **more).eval()


def _ends(model: Any, tokenizer: Any) -> set[int]:  # Any: families
    ends = model.generation_config.eos_token_id
    found = {ends} if isinstance(ends, int) else set(ends or ())
    return found | ({tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set())
