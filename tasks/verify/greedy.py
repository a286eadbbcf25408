"""Greedy answers: token by token what transformers says, up to where two tokens are as likely.

    served tokens  vs  transformers' tokens, each with its lead over the next best

A greedy answer has no tolerance of its own: one rounding that turns a near tie changes all that follows. So
tokens are compared up to the first that differs; there transformers' own two best must be nearer to each other
than the dtype's rounding, and the served one must be the second best. What follows is another text.

Ring: pure.  Units: nats.
"""

from dataclasses import dataclass
from typing import Any

from tasks.errors import AttestationError, CorruptError

# leads that rounding can turn: twice the largest difference of vLLM and transformers that was seen on a CPU
# (float32 below 0.0005, bfloat16 0.12); float16 has three bits more than bfloat16
TIES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyStep:
    """One token of transformers' greedy answer: its lead over the next best, which is `second`."""

    token: int
    second: int
    lead: float


def greedy_request(model: str, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:  # Any: JSON values
    """Return the /v1/completions body for a greedy answer whose tokens come back as ids."""
    return {
        "model": model,
        "prompt": prompt_ids,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def greedy_tokens(reply: dict[str, Any]) -> list[int]:  # Any: JSON values
    """Return the tokens of the answer. Raises CorruptError when the reply holds none."""
    tokens = (reply.get("choices") or [{}])[0].get("token_ids")
    if not isinstance(tokens, list) or not tokens:
        raise CorruptError(f"the endpoint returned no token ids for a greedy answer ({tokens}): is it vLLM?")
    return tokens


def compare_greedy(served: list[int], expected: list[GreedyStep], dtype: str) -> int:
    """Return how many tokens were compared and found right.

    Raises: AttestationError at the first token that is not transformers', unless it is a near tie.

    >>> compare_greedy([5, 9], [GreedyStep(token=5, second=1, lead=2.0), GreedyStep(token=7, second=9, lead=1e-5)], "float32")
    2
    """  # noqa: E501
    for index, (token, step) in enumerate(zip(served, expected, strict=False)):
        if token == step.token:
            continue
        if token == step.second and step.lead <= TIES[dtype]:
            return index + 1
        raise AttestationError(
            f"the served model's greedy token {index} is {token}, the merged files' is {step.token} with a lead of "
            f"{step.lead:.4f} nats over {step.second} (a tie in {dtype} is at most {TIES[dtype]:g}): other weights, "
            "another precision, or another tokenizer is served. Redeploy the merged folder"
        )
    if len(served) < len(expected):
        raise AttestationError(
            f"the served model's greedy answer ends after {len(served)} tokens, the merged files' goes on to "
            f"{len(expected)}: is the generation config another one? Redeploy the merged folder"
        )
    return len(expected)
