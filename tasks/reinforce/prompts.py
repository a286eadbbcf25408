"""The prompts of a run, taken from packed rows: what is asked is, token by token, what SFT would have learnt from.

    train.parquet (input_ids, labels, seq_lengths) -> prompt_ids | answer_ids of each document -> Prompt

Ring: pure (the tokenizer is an argument).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.errors import DataError, SpecError
from tasks.reinforce.said import answer_text, question_text
from tasks.specs import ReinforceSpec

_IGNORE = -100


class Decoder(Protocol):
    """What is used of transformers' tokenizer."""

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> Any:  # Any: transformers' signature
        """Return the text of ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question: its tokens, its text, the reference answer."""

    ids: tuple[int, ...]
    question: str
    answer: str


def collect_prompts(rows: Iterable[Mapping[str, Any]], tokenizer: Decoder) -> tuple[list[Prompt], int]:  # Any: columns
    """Return every question once, and how many were there twice with the same answer.

    Raises: DataError for a question with two answers, and for rows without a prompt.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    twice = 0
    for prompt_ids, answer_ids in _documents(rows):
        whole = str(tokenizer.decode(prompt_ids, skip_special_tokens=False))
        answer = answer_text(str(tokenizer.decode(answer_ids, skip_special_tokens=False))).strip()
        prompt = Prompt(ids=tuple(prompt_ids), question=question_text(whole), answer=answer)
        known = found.setdefault(prompt.ids, prompt)
        twice += known is not prompt
        if known.answer != answer:
            raise DataError(
                f"the question {prompt.question[:80]!r} has two answers, {known.answer[:60]!r} and {answer[:60]!r}: a "
                "reward can compare with one; leave one row out"
            )
    if not found:
        raise DataError("no question is left to ask: the data set has no row with a question and an answer")
    return list(found.values()), twice


def completion_tokens(prompts: Sequence[Prompt], spec: ReinforceSpec) -> int:
    """Return the most tokens of a completion. Raises SpecError when the longest prompt leaves none.

    >>> completion_tokens([Prompt(ids=(1,) * 40, question="", answer="")], ReinforceSpec(max_sequence_tokens=100))
    60
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    room = spec.max_sequence_tokens - len(longest.ids)
    if room < max(1, spec.max_completion_tokens):
        raise SpecError(
            f"ReinforceSpec.max_sequence_tokens = {spec.max_sequence_tokens} but the prompt of "
            f"{longest.question[:60]!r} has {len(longest.ids)} tokens, which leaves {max(0, room)} for a completion "
            f"(max_completion_tokens = {spec.max_completion_tokens}): raise the first or lower the last"
        )
    return spec.max_completion_tokens or room


def planned_steps(num_prompts: int, spec: ReinforceSpec) -> int:
    """Return the optimizer steps of a run: a step's completions are `num_generations` of each of its prompts.

    >>> planned_steps(10, ReinforceSpec(num_epochs=2))
    10
    """
    if spec.max_steps > 0:
        return spec.max_steps
    prompts_per_step = spec.rows_per_step // spec.num_generations
    return max(1, int(spec.num_epochs * (num_prompts // prompts_per_step) * spec.num_iterations))


def require_enough(num_prompts: int, spec: ReinforceSpec) -> None:
    """Raise DataError when there are fewer questions than one step asks."""
    wanted = spec.rows_per_step // spec.num_generations
    if num_prompts < wanted:
        raise DataError(
            f"the data has {num_prompts} questions but a step asks {wanted} ({spec.rows_per_step} completions, "
            f"{spec.num_generations} of each): add rows, or lower gradient_accumulation"
        )


def _documents(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[list[int], list[int]]]:  # Any: columns
    for row in rows:
        start = 0
        for size in row["seq_lengths"]:
            ids, labels = (list(row[name][start : start + size]) for name in ("input_ids", "labels"))
            start += size
            asked = next((place for place, label in enumerate(labels) if label != _IGNORE), size)
            if 0 < asked < size:
                yield ids[:asked], ids[asked:]
