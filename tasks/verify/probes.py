"""Which questions are asked of the served model, and what its answers must show.

    served = log-probability of each token of validation answers, asked from the endpoint
    merged = the same, computed from the merged files      |mean served - mean merged| <= max_logprob_gap
    base   = the same, computed from the base              mean served - mean base >= min_base_margin
                              mean |served - merged| <= max_token_gap_share * mean |merged - base|   (bfloat16)
    tuned  = the same, from the base with the adapter, merged by PEFT
                              mean |served - tuned| <= max_token_gap_share * mean |tuned - base|
    gain   = what the trainer's own validation loss fell by
                              |(served - base) - gain| <= max_gain_mismatch * gain (+ three standard errors)

The first says that the served files are as good as the merged ones, the second that they differ
from the base in the direction that training moved them, the third that they are these weights,
token by token: another tune of the same base can have the same mean, and is about as far from this
one as the base is. The last two do not believe the merge: `tuned` is made by other code from what was
trained, and `gain` was measured before anything was merged.

Ring: pure.  Units: nats per token.
"""

import math
from dataclasses import dataclass
from typing import Any

from tasks.errors import AttestationError, CorruptError
from tasks.specs import VerifySpec

# of max_token_gap_share: rounding sends tokens to other experts in bfloat16, hardly ever in float32; with gate and up
# swapped in every layer of a small untrained gpt-oss the tokens are off by 0.23 of what the tune moved them
_SHARES = {"float32": 0.2, "float16": 0.5, "bfloat16": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The models on the same answers: mean log-probability per answer token, and how far apart token by token.

    `token_gap` is mean |served - merged|, `tuning_gap` mean |merged - base|; `adapter_gap` mean |served - tuned|,
    `adapter_move` mean |tuned - base|.
    """

    served: float
    merged: float
    base: float
    token_gap: float
    tuning_gap: float
    adapter_gap: float
    adapter_move: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What the tune brought: to the trainer on all its validation tokens, to the endpoint on those that were scored.

    `error` is the standard error of `served` for the answers that were not scored; 0 when all were.
    """

    trainer: float
    served: float
    error: float


def compare(served: list[float], merged: list[float], base: list[float], tuned: list[float]) -> Scores:
    """Return the scores of lists of log-probabilities of the same tokens.

    Raises: CorruptError when they are not of the same tokens.

    >>> compare([-1.0, -2.0], [-1.0, -2.5], [-2.0, -3.5], [-1.0, -2.5]).token_gap
    0.25
    """
    if not len(served) == len(merged) == len(base) == len(tuned):
        raise CorruptError(
            f"{len(served)} served, {len(merged)} merged, {len(base)} base and {len(tuned)} tuned tokens were scored"
        )
    return Scores(
        served=mean(served),
        merged=mean(merged),
        base=mean(base),
        token_gap=_distance(served, merged),
        tuning_gap=_distance(merged, base),
        adapter_gap=_distance(served, tuned),
        adapter_move=_distance(tuned, base),
    )


def measure_gain(
    served: list[float], base: list[float], lengths: list[int], *, trainer: float, num_documents: int
) -> Gain:
    """Return the gain per token over the scored answers, and how far off it may be for want of the others.

    Args:
        served: log-probabilities of the answers' tokens, one answer after the other.
        base: the same of the base.
        lengths: tokens of each answer.
        trainer: validation loss before minus after training, nats per token.
        num_documents: answers that the trainer's loss is of.
    Source: ratio estimator without replacement, Cochran, Sampling Techniques, 6.4.

    >>> measure_gain([-1.0, -1.0, -3.0], [-2.0, -2.0, -5.0], [2, 1], trainer=1.3, num_documents=2)
    Gain(trainer=1.3, served=1.3333333333333333, error=0.0)
    """
    each = [s - b for s, b in zip(served, base, strict=True)]
    gain, number = mean(each), len(lengths)
    left = max(0.0, 1.0 - number / num_documents)
    if not left:
        return Gain(trainer=trainer, served=gain, error=0.0)
    if number < 2:
        return Gain(trainer=trainer, served=gain, error=math.inf)
    ends = [sum(lengths[: index + 1]) for index in range(number)]
    off = [sum(each[end - size : end]) - gain * size for end, size in zip(ends, lengths, strict=True)]
    variance = sum(value * value for value in off) * number / (number - 1)
    return Gain(trainer=trainer, served=gain, error=math.sqrt(variance * left) / len(each))


def _distance(one: list[float], other: list[float]) -> float:
    return mean([abs(a - b) for a, b in zip(one, other, strict=True)])


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


def token_share(spec: VerifySpec, dtype: str) -> float:
    """Return the largest token by token gap of served and files, as a share of what training moved.

    >>> token_share(VerifySpec(max_token_gap_share=0.25), "float16")
    0.125
    """
    return spec.max_token_gap_share * _SHARES[dtype]


def check_scores(scores: Scores, spec: VerifySpec, dtype: str, *, is_requantized: bool = False) -> None:
    """Raise AttestationError when the served model is not the merged one, or no better than the base.

    Args:
        scores: what was measured.
        spec: what is allowed, in bfloat16.
        dtype: what is served in; the token by token tolerance follows it.
        is_requantized: the merged experts were rounded to MXFP4: PEFT's own merge in full precision is then no
            yardstick. The merge has compared its deltas with PEFT's, and the trainer's gain must still be there.
    """
    share = token_share(spec, dtype)
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
    if scores.token_gap > share * scores.tuning_gap:
        raise AttestationError(
            f"the served model is not the merged one: token by token its log-probabilities differ by "
            f"{scores.token_gap:.4f} from those of the merged files, which the tune moved by {scores.tuning_gap:.4f} "
            f"(allowed {share:g} of that in {dtype}): it is another tune of this base, or a part of this one. "
            "Redeploy the merged folder; the artifact's digest says which"
        )
    if not is_requantized and scores.adapter_gap > share * scores.adapter_move:
        raise AttestationError(
            f"the merged model is not its base with its adapter: token by token its log-probabilities differ by "
            f"{scores.adapter_gap:.4f} from those that PEFT's own merge gives, which the adapter moved by "
            f"{scores.adapter_move:.4f} (allowed {share:g} of that in {dtype}): deltas were dropped, scaled or "
            "put elsewhere, or it is another adapter's. Remove the merged artifact and merge again"
        )
    margin = scores.served - scores.base
    if spec.must_beat_base and margin < spec.min_base_margin:
        raise AttestationError(
            f"the served model is no better than its base on the validation answers: {scores.served:.4f} against "
            f"{scores.base:.4f} (margin {margin:.4f}, wanted {spec.min_base_margin:g}): train longer, look at the data"
        )


def check_gain(gain: Gain, spec: VerifySpec) -> None:
    """Raise AttestationError when the endpoint is not better than the base by what the trainer measured."""
    allowed = spec.max_gain_mismatch * abs(gain.trainer) + 3 * gain.error
    if not spec.must_beat_base:  # what a reward brings there may be next to nothing, and is rounded
        allowed += spec.max_logprob_gap
    if not abs(gain.served - gain.trainer) <= allowed:  # also NaN
        raise AttestationError(
            f"the served model is better than its base by {gain.served:.4f} nats per token, but training lowered the "
            f"validation loss by {gain.trainer:.4f} (allowed difference {allowed:.4f}: {spec.max_gain_mismatch:g} of "
            f"that, and three standard errors of {gain.error:.4f} for the answers that were not scored): it is not "
            "what was trained, or served in another precision. Merge again, or raise VerifySpec.max_gain_mismatch"
        )
