"""What the Prefect UI shows of questions and of a model that was trained on them.

Ring: pure.
"""

import json
from typing import Any

from tasks.artifacts import PreparedQuestions, ReinforcedModel


def questions_markdown(questions: PreparedQuestions, about: dict[str, Any]) -> str:  # Any: JSON values
    """Return counts and the first row as verl reads it."""
    sample = json.dumps(about["sample"], ensure_ascii=False, indent=2)
    return (
        f"| | rows |\n|---|---:|\n| train | {questions.num_train_rows:,} |\n| test | {questions.num_test_rows:,} |\n"
        f"| rejected | {questions.num_rejected_rows:,} |\n\nOf `{questions.source}`, `{questions.revision[:12]}`.\n\n"
        f"```json\n{sample}\n```\n"
    )


def model_markdown(model: ReinforcedModel) -> str:
    """Return what was reached, and where the files are."""
    before, after = (_say(score) for score in (model.test_score_before, model.test_score_after))
    return (
        f"| | |\n|---|---|\n| steps | {model.num_steps:,} |\n| mean test score before | {before} |\n"
        f"| mean test score after | {after} |\n| parameters | {model.num_parameters:,} |\n"
        f"| digest | `{model.model_digest}` |\n| files | `{model.model_folder}` |\n"
    )


def _say(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.4f}"
