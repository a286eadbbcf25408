"""Which questions are asked of the served model, and what its answers must show.

    served = log-probability of each token of validation answers, asked from the endpoint
    merged = the same, computed from the merged files      |mean served - mean merged| <= max_logprob_gap
    base   = the same, computed from the base              mean served - mean base >= min_base_margin
                              mean |served - merged| <= max_token_gap_share * mean |merged - base|

The first says that the served files are as good as the merged ones, the second that they differ
from the base in the direction that training moved them, the third that they are these weights,
token by token: another tune of the same base can have the same mean, and is about as far from this
one as the base is.

Ring: pure.  Units: nats per token.
"""

import math
from dataclasses import dataclass
from typing import Any

from tasks.errors import AttestationError, CorruptError
from tasks.specs import VerifySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Three models on the same answers: mean log-probability per answer token, and how far apart token by token.

    `token_gap` is mean |served - merged|, `tuning_gap` mean |merged - base|.
    """

    served: float
    merged: float
    base: float
    token_gap: float
    tuning_gap: float


def compare(served: list[float], merged: list[float], base: list[float]) -> Scores:
    """Return the scores of three lists of log-probabilities of the same tokens.

    Raises: CorruptError when they are not of the same tokens.

    >>> compare([-1.0, -2.0], [-1.0, -2.5], [-2.0, -3.5])
    Scores(served=-1.5, merged=-1.75, base=-2.75, token_gap=0.25, tuning_gap=1.0)
    """
    if not len(served) == len(merged) == len(base):
        raise CorruptError(f"{len(served)} served, {len(merged)} merged and {len(base)} base tokens were scored")
    return Scores(
        served=mean(served),
        merged=mean(merged),
        base=mean(base),
        token_gap=mean([abs(s - m) for s, m in zip(served, merged, strict=True)]),
        tuning_gap=mean([abs(m - b) for m, b in zip(merged, base, strict=True)]),
    )


def scoring_request(model: str, prompt_ids: list[int], answer_ids: list[int]) -> dict[str, Any]:  # Any: JSON values
    """Return the /v1/completions body that makes vLLM score given tokens."""
    return {
        "model": model,
        "prompt": [*prompt_ids, *answer_ids],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "add_special_tokens": False,
    }


def answer_logprobs(reply: dict[str, Any], prompt_ids: list[int], answer_ids: list[int]) -> list[float]:
    """Return log p(token | before) of each answer token from vLLM's reply.

    Raises: CorruptError when the reply does not hold one entry for each token.
    """
    entries = (reply.get("choices") or [{}])[0].get("prompt_logprobs")
    expected = len(prompt_ids) + len(answer_ids)
    if not isinstance(entries, list) or len(entries) != expected:
        got = len(entries) if isinstance(entries, list) else "no"
        raise CorruptError(f"the endpoint returned {got} prompt log-probabilities, expected {expected}: is it vLLM?")
    values: list[float] = []
    for token, entry in zip(answer_ids, entries[len(prompt_ids) :], strict=True):
        if str(token) not in (entry or {}):
            scored = ", ".join(entry or {}) or "none"
            raise CorruptError(f"the endpoint scored tokens {scored} where {token} was asked for")
        values.append(float(entry[str(token)]["logprob"]))
    return values


def mean(values: list[float]) -> float:
    """Return the mean; answers count by their tokens.

    >>> mean([-1.0, -3.0])
    -2.0
    """
    return sum(values) / len(values)


def check_scores(scores: Scores, spec: VerifySpec) -> None:
    """Raise AttestationError when the served model is not the merged one, or no better than the base."""
    if not all(map(math.isfinite, (scores.served, scores.merged, scores.base))):  # NaN passes every comparison
        raise AttestationError(
            f"a mean log-probability is not finite (served {scores.served}, merged {scores.merged}, base {scores.base})"
            ": a model is damaged or overflows in its dtype; look at the merge ledger, or serve with another dtype"
        )
    gap = abs(scores.served - scores.merged)
    if gap > spec.max_logprob_gap:
        looks = " It answers like the base." if abs(scores.served - scores.base) < gap / 10 else ""
        raise AttestationError(
            f"the served model is not the merged one: its mean log-probability is {scores.served:.4f}, the merged "
            f"files give {scores.merged:.4f} (gap {gap:.4f}, allowed {spec.max_logprob_gap:g}).{looks} Redeploy the "
            "merged folder; the artifact's digest says which"
        )
    if scores.token_gap > spec.max_token_gap_share * scores.tuning_gap:
        raise AttestationError(
            f"the served model is not the merged one: token by token its log-probabilities differ by "
            f"{scores.token_gap:.4f} from those of the merged files, which the tune moved by {scores.tuning_gap:.4f} "
            f"(allowed {spec.max_token_gap_share:g} of that): it is another tune of this base, or a part of this one. "
            "Redeploy the merged folder; the artifact's digest says which"
        )
    margin = scores.served - scores.base
    if margin < spec.min_base_margin:
        raise AttestationError(
            f"the served model is no better than its base on the validation answers: {scores.served:.4f} against "
            f"{scores.base:.4f} (margin {margin:.4f}, wanted {spec.min_base_margin:g}): train longer, look at the data"
        )
