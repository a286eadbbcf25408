"""A served model, asked over HTTP with tokens: vLLM's /v1/completions, prompt log-probabilities and greedy text.

Not the gateway: its traces are of real requests, and during a promotion it still serves the old model.
Not the chat route: with the same tokens an endpoint and model files give the same figures; that the
server renders chats as training did is what verify proves.

Ring: edge (network).  Units: seconds.
"""

import json
import os
import urllib.error
import urllib.request
from typing import Any

from tasks.environment import read_secret
from tasks.errors import CorruptError, ServiceError, TransientError

_AT_ONCE = 8


class EndpointModel:
    """One model behind one address."""

    at_once = _AT_ONCE

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url, self._model, self._timeout_s = f"{url.rstrip('/')}/v1/completions", model, timeout_s

    def score(self, prompt_ids: list[int], continuations: list[list[int]]) -> list[list[float]]:
        """Return log p of each token; all continuations in one request. Raises CorruptError for other tokens."""
        prompts = [[*prompt_ids, *ids] for ids in continuations]
        choices = self._post({"prompt": prompts, "max_tokens": 1, "prompt_logprobs": 0})
        if len(choices) != len(prompts):
            raise CorruptError(f"{self._url} gave {len(choices)} choices to {len(prompts)} prompts: is it vLLM?")
        by_index = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [
            self._picked(choice.get("prompt_logprobs"), len(prompt_ids), ids)
            for choice, ids in zip(by_index, continuations, strict=True)
        ]

    def generate(self, prompt_ids: list[int], max_tokens: int, stop_ids: list[int]) -> list[int]:
        """Return the greedy continuation."""
        wish = {"prompt": prompt_ids, "max_tokens": max_tokens, "stop_token_ids": stop_ids, "return_token_ids": True}
        [choice] = self._post(wish)
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise CorruptError(f"{self._url} returned no token_ids: it is no vLLM, or one before 0.10.2")
        return ids

    def _picked(self, entries: Any, num_before: int, ids: list[int]) -> list[float]:  # Any: a JSON value
        if not isinstance(entries, list) or len(entries) != num_before + len(ids):
            raise CorruptError(f"{self._url} returned no prompt log-probabilities for our tokens: is it vLLM?")
        values: list[float] = []
        for token, entry in zip(ids, entries[num_before:], strict=True):
            if str(token) not in (entry or {}):
                raise CorruptError(f"{self._url} scored {', '.join(entry or {}) or 'no token'} where {token} was asked")
            values.append(float(entry[str(token)]["logprob"]))
        return values

    def _post(self, wish: dict[str, Any]) -> list[dict[str, Any]]:  # Any: JSON values
        body = {"model": self._model, "temperature": 0.0, "add_special_tokens": False, **wish}
        headers = {"content-type": "application/json"}
        if key := read_secret(os.environ, "VLLM_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)  # noqa: S310 - our own endpoint
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:  # noqa: S310 - our own endpoint
                return json.load(reply)["choices"]
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            cls = TransientError if error.code in (408, 429, 502, 503, 504) else ServiceError
            raise cls(f"{self._url} answered {error.code}: {said}") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise TransientError(f"{self._url} does not answer ({error}): is vLLM running?") from error
