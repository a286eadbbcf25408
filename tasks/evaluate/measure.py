"""Ask one model everything: the same loop over an endpoint and over model files.

    items -> Model.score(), Model.generate() -> Asked, one per item

Ring: edge (threads, for a model that answers several at once).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypedDict


class Asked(TypedDict):
    """What a model answered to one item: log-probabilities by continuation and token, and generated ids."""

    logprobs: list[list[float]]
    generated: list[int]


class Model(Protocol):
    """A model that can be asked, wherever it runs."""

    at_once: int

    def score(self, prompt_ids: list[int], continuations: list[list[int]]) -> list[list[float]]:
        """Return log p(token | before) of each token of each continuation."""
        ...

    def generate(self, prompt_ids: list[int], max_tokens: int, stop_ids: list[int]) -> list[int]:
        """Return the greedy continuation, at most `max_tokens`, ended by a token of `stop_ids`."""
        ...


def ask(
    model: Model, items: Sequence[dict[str, Any]], max_tokens: int, stop_ids: list[int]
) -> list[Asked]:  # Any: Item
    """Ask every item, in order. `items` are Item.values()."""

    def one(item: dict[str, Any]) -> Asked:  # Any: Item
        generated = model.generate(item["prompt_ids"], max_tokens, stop_ids) if item["is_generated"] else []
        return {"logprobs": model.score(item["prompt_ids"], item["continuations"]), "generated": generated}

    if model.at_once == 1:
        return [one(item) for item in items]
    with ThreadPoolExecutor(model.at_once) as pool:
        return list(pool.map(one, items))
