"""What a served model that was pretrained here has to show: that it is these files, and that they were trained.

    served    = mean log p of the probes' tokens, asked from the endpoint
    files     = the same, from the files by transformers         |served - files| <= max_logprob_gap, and token by token
    untrained = the same, of random weights of the same config   served - untrained >= min_base_margin

Files of random weights are served faithfully: only the third tells. Another model's files fail the first two.

Ring: pure.  Units: nats per token.
"""

import math
from collections.abc import Sequence

from tasks.errors import AttestationError, DataError
from tasks.specs import VerifySpec
from tasks.verify.probes import Scores

PROBE_TOKENS = 128
# mean |served - files| of a token that rounding explains: vLLM's CPU build and transformers were at most 5e-4 apart in
# float32, at a single token; in bfloat16 0.12, where rounding sends tokens to other experts. In bfloat16 a neighbouring
# checkpoint of the same training is not told apart by this, only by its files' digests
TOKEN_GAPS = {"float32": 0.001, "float16": 0.03, "bfloat16": 0.12}


def choose_spans(ends: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Return (start, end) of `count` probes of a corpus, evenly over it.

    Of several documents their beginnings; of one long document parts of it.

    Args:
        ends: offset behind each document's last token.
        count: how many are wanted; fewer when there are fewer documents of two tokens.

    >>> choose_spans([3, 4, 10], 5)
    [(0, 3), (4, 10)]
    >>> choose_spans([1000], 3)
    [(0, 128), (436, 564), (872, 1000)]
    """
    starts = [0, *ends[:-1]]
    spans = [(start, min(end, start + PROBE_TOKENS)) for start, end in zip(starts, ends, strict=True)]
    if len(ends) == 1 and ends[0] > PROBE_TOKENS:
        last = ends[0] - PROBE_TOKENS
        firsts = sorted({round(last * number / max(1, count - 1)) for number in range(count)})
        spans = [(first, first + PROBE_TOKENS) for first in firsts]
    spans = [(start, end) for start, end in spans if end - start > 1]
    if not spans:
        raise DataError("the corpus has no document of two tokens to probe with: give VerifySpec.probe_texts")
    step = max(1.0, len(spans) / count)
    return [spans[int(number * step)] for number in range(min(count, len(spans)))]


def check_base_scores(scores: Scores, spec: VerifySpec, dtype: str) -> None:
    """Raise AttestationError when the served model is not the published files, or these were never trained.

    Args:
        scores: `merged` are the published files, `base` random weights of their config.
        spec: what is allowed.
        dtype: what is served in; the token by token tolerance follows it.
    """
    if not all(map(math.isfinite, (scores.served, scores.merged, scores.base))):  # NaN passes every comparison
        raise AttestationError(
            f"a mean log-probability is not finite (served {scores.served}, files {scores.merged}, untrained "
            f"{scores.base}): the model is damaged or overflows in {dtype}; look at its losses, or serve with another"
        )
    gap = abs(scores.served - scores.merged)
    if gap > spec.max_logprob_gap or scores.token_gap > TOKEN_GAPS[dtype]:
        looks = " It answers like random weights." if abs(scores.served - scores.base) < gap / 10 else ""
        raise AttestationError(
            f"the served model is not the published one: its mean log-probability is {scores.served:.4f}, the files "
            f"give {scores.merged:.4f} (gap {gap:.4f}, allowed {spec.max_logprob_gap:g}; token by token "
            f"{scores.token_gap:.4f}, allowed {TOKEN_GAPS[dtype]:g} in {dtype}).{looks} Redeploy the published folder"
        )
    margin = scores.served - scores.base
    if margin < spec.min_base_margin:
        raise AttestationError(
            f"the served model is no better than random weights of its shape: {scores.served:.4f} against "
            f"{scores.base:.4f} (margin {margin:.4f}, wanted {spec.min_base_margin:g}): train longer, look at the "
            "corpus and its tokenizer"
        )
