"""Turn a row with a question and an answer into a row of verl's schema, or say why not.

    {"question", "answer": "... #### 42"} -> {data_source, prompt, ability, reward_model, extra_info}

Ring: pure.  Source of the schema: verl, examples/data_preprocess/gsm8k.py.
"""

import re
from typing import Any

from tasks.errors import DataError
from tasks.specs import QuestionsSpec

MARK = "####"
_NUMBER = re.compile(r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")


class RejectedQuestionError(DataError):
    """One row that can't be asked; the reason is the message."""


def read_question(
    row: dict[str, Any], spec: QuestionsSpec, split: str, index: int
) -> dict[str, Any]:  # Any: row values
    """Return the row as verl reads it. Raises RejectedQuestionError with the reason."""
    question, answer = _text(row, spec.question_column), _text(row, spec.answer_column)
    return {
        "data_source": spec.data_source,
        "prompt": [{"role": "user", "content": f"{question} {spec.instruction}".strip()}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": extract_answer(answer)},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def extract_answer(answer: str) -> str:
    r"""Return the number behind ####, without separators of thousands, as verl's reward compares it.

    >>> extract_answer("5 bags of 200 are 5*200=1000.\n#### 1,000")
    '1000'
    >>> extract_answer("about ten")
    Traceback (most recent call last):
    ...
    tasks.ppo.questions.RejectedQuestionError: the answer has no ####, which stands before its number
    """
    _, mark, behind = answer.rpartition(MARK)
    if not mark:
        raise RejectedQuestionError(f"the answer has no {MARK}, which stands before its number")
    found = behind.strip()
    if not _NUMBER.fullmatch(found):
        raise RejectedQuestionError(f"behind {MARK} stands {found[:40]!r}, expected a number such as 42 or 1,000")
    return found.replace(",", "")


def _text(row: dict[str, Any], name: str) -> str:  # Any: row values
    if name not in row:
        raise RejectedQuestionError(f"no column {name!r}; the row has {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise RejectedQuestionError(f"{name} is {'empty' if isinstance(value, str) else type(value).__name__}")
    return value.strip()
