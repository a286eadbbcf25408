"""What a served model that was trained with rewards has to show: that it is these files, and not the base.

    served = mean log p of the probes' tokens, asked from the endpoint
    files  = the same, from the files by transformers       |served - files| <= max_logprob_gap
    base   = the same, of the base it began as               mean |served - files| <= share * mean |files - base|

All three are of the answers to test questions. Rewards teach other answers than those, so none of it says how good
the model is: verl's test score does. A run of few steps may move less than rounding does: then the log-probabilities
don't tell the files from their base, and only the digests do that were compared before anything was served.

Ring: pure.  Units: nats per token.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from tasks.errors import AttestationError, DataError
from tasks.specs import VerifySpec
from tasks.verify.base_probes import PROBE_TOKENS, TOKEN_GAPS
from tasks.verify.probes import Scores, check_scores, token_share


def choose_questions(
    pairs: Iterable[tuple[list[int], list[int]]], count: int, *, max_prompt: int, max_answer: int
) -> list[dict[str, Any]]:  # Any: token columns
    """Return the first `count` (prompt, answer) pairs that the training could have asked, as documents to score.

    Args:
        pairs: token ids of prompt and answer.
        count: how many are wanted; fewer when there are fewer.
        max_prompt: longer prompts are left out, as verl leaves them out.
        max_answer: answers are cut to that, and to PROBE_TOKENS.
    Raises: DataError when none fits.

    >>> choose_questions([([1] * 9, [2]), ([3], [4, 5, 6])], 5, max_prompt=8, max_answer=2)
    [{'row_id': '0', 'prompt_ids': [3], 'answer_ids': [4, 5]}]
    """
    longest = min(max_answer, PROBE_TOKENS)
    fitting = ((prompt, answer[:longest]) for prompt, answer in pairs if answer and 0 < len(prompt) <= max_prompt)
    chosen = list(islice(fitting, count))
    if not chosen:
        raise DataError(
            f"no test question has a prompt of at most {max_prompt} tokens and an answer: give VerifySpec.probe_texts"
        )
    return [
        {"row_id": str(number), "prompt_ids": prompt, "answer_ids": answer}
        for number, (prompt, answer) in enumerate(chosen)
    ]


def find_doubt(scores: Scores, spec: VerifySpec, dtype: str) -> str:
    """Say why the scores don't tell the served model from its base; "" when they do, or when it is neither.

    Args:
        scores: `merged` are the published files.
        spec: what share of the change the gap may be.
        dtype: what is served in; what rounding explains follows it.
    """
    share, rounding = token_share(spec, dtype), TOKEN_GAPS[dtype]
    is_near = scores.token_gap <= rounding  # not with NaN
    if not is_near or scores.token_gap < share * scores.tuning_gap:
        return ""
    return (
        f"training moved the log-probabilities of the probed answers by {scores.tuning_gap:.3g} a token, and the "
        f"endpoint is {scores.token_gap:.3g} from the files (less than {share:g} of that was wanted; rounding in "
        f"{dtype} may be up to {rounding:g}): they don't tell the served model from its base"
    )


def check_reinforced_scores(scores: Scores, spec: VerifySpec, dtype: str) -> None:
    """Raise AttestationError unless the served model is the published files, and told from their base.

    With `may_equal_base` a model passes that was moved too little to be told from it; find_doubt says so.
    """
    doubt = find_doubt(scores, spec, dtype)
    check_scores(replace(scores, token_gap=0.0) if doubt else scores, spec, dtype)
    if doubt and not spec.may_equal_base:
        raise AttestationError(
            f"{doubt}. Train longer, serve in float32, or let it pass with VerifySpec.may_equal_base: the digests of "
            "its files, which were compared before it was served, then have to do"
        )
