"""The model card of a whole model that was trained with rewards: base, questions, algorithm, steps, rewards, digests.

    ReinforcedLineage + PublishSpec -> front matter (YAML) + Markdown; states only what the artifacts say

Ring: pure.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from tasks.artifacts import BaseCheckpoint, PreparedQuestions, ReinforcedModel
from tasks.publish.base_card import usage
from tasks.publish.card import (
    RECIPE,
    REWARD_CURVE,
    Row,
    base_caveat,
    base_rows,
    license_row,
    license_values,
    local_caveat,
    table,
)
from tasks.publish.facts import SourceCard
from tasks.publish.names import block, code, hub_id, hub_origin, one_line, shown_spec, without_folder
from tasks.specs import PublishSpec

RECIPE_NAME = "llama1b_ppo_h100"  # of which only the cluster's address and what comes after the model are left as is


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforcedLineage:
    """What is known of a model that was trained with rewards. `versions` are those of the cluster that trained it.

    `questions` are None when their artifact was cleared away.
    """

    model: ReinforcedModel
    base: BaseCheckpoint
    questions: PreparedQuestions | None
    spec: dict[str, Any]  # PpoSpec (Any: JSON values)
    questions_spec: dict[str, Any]  # QuestionsSpec (Any: as above)
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # metrics.jsonl
    base_card: SourceCard = field(default_factory=SourceCard)
    data_card: SourceCard = field(default_factory=SourceCard)
    versions: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def rewarded(self) -> list[dict[str, Any]]:  # Any: as above
        """The steps whose mean reward is known."""
        return [record for record in self.records if record.get("reward") is not None]


def reinforced_card(lineage: ReinforcedLineage, spec: PublishSpec, repo_id: str) -> str:
    """Return README.md with the Hub's front matter."""
    base_id, _ = hub_origin(lineage.base.origin)
    base = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else code(without_folder(lineage.base.origin))
    parts = [
        f"---\n{_front_matter(lineage, spec, base_id)}---\n",
        f"# {one_line(repo_id.rpartition('/')[2])}",
        f"{base}, all of its {lineage.model.num_parameters:,} parameters trained with rewards (PPO by verl on Ray); "
        "trained, checked and published by Tatara.",
        block(usage(repo_id), "python"),
        "## What went in",
        table(_sources(lineage, spec)),
        "## Training",
        table(_training(lineage)),
        *([f"![Reward, test score, length, policy and critic by step]({REWARD_CURVE})"] if lineage.rewarded else []),
        "## Make it again",
        f"`{RECIPE}` in this repository holds every knob but the cluster's address, which is `RAY_ADDRESS` or "
        "`changes.ray.address`. In a checkout of Tatara, after `tatara up`:",
        block('prefect deployment run reinforce-ppo/gsm8k --watch --params "$(cat recipe.json)"', "bash"),
        *base_caveat(lineage.base),
        *_data_caveat(lineage),
        block(json.dumps(reinforced_reproduction(lineage), ensure_ascii=False, indent=2), "json"),
        "## Versions",
        table([(package, code(number)) for package, number in lineage.versions.items() if number]),
    ]
    return "\n\n".join(parts) + "\n"


def reinforced_reproduction(lineage: ReinforcedLineage) -> dict[str, Any]:  # Any: JSON values
    """Return the parameters of the flow `reinforce-ppo` that make this model again.

    Moving names (a branch of the questions, of the base) are replaced by the commits that they meant.
    """
    base_id, commit = hub_origin(lineage.base.origin)
    questions = lineage.questions
    pinned = {"revision": questions.revision} if questions and hub_id(questions.source) else {}
    changes = {
        "base": {"model": base_id or without_folder(lineage.base.origin), "revision": commit or "main"},
        **({"questions": {**shown_spec(lineage.questions_spec), **pinned}} if questions else {}),
        "ppo": shown_spec(lineage.spec),
    }
    return {"recipe": RECIPE_NAME, "changes": changes}


def _front_matter(lineage: ReinforcedLineage, spec: PublishSpec, base_id: str) -> str:
    values: dict[str, Any] = {  # Any: YAML values
        **license_values(lineage.base_card, spec),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tatara", "ppo", "verl"],
    }
    if base_id:
        values |= {"base_model": base_id, "base_model_relation": "finetune"}
    if lineage.questions and hub_id(lineage.questions.source):
        values["datasets"] = [lineage.questions.source]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def _sources(lineage: ReinforcedLineage, spec: PublishSpec) -> list[Row]:
    scored = lineage.questions_spec.get("data_source", "")
    return [
        *base_rows(lineage.base, lineage.base_card),
        ("digest of the base", code(lineage.model.base_digest)),
        ("questions", _questions(lineage.questions)),
        license_row("questions", spec.data_license or lineage.data_card.license),
        ("reward", f"verl's for {code(scored)}" if scored else "not known"),
    ]


def _questions(questions: PreparedQuestions | None) -> str:
    if questions is None:
        return "not known"
    rows = f"{questions.num_train_rows:,} training and {questions.num_test_rows:,} test questions"
    return f"{code(without_folder(questions.source))} at {code(questions.revision)}, {rows}"


def _training(lineage: ReinforcedLineage) -> list[Row]:
    model, said = lineage.model, lineage.spec
    batch = f"{said.get('train_batch_size')} questions, updates of {said.get('ppo_mini_batch_size')}"
    critic = code(without_folder(said["critic_model"])) if said.get("critic_model") else "the base"
    rates = f"actor {said.get('actor_learning_rate', 0):g}, critic {said.get('critic_learning_rate', 0):g}"
    kl = f"{said.get('kl_coef', 0):g} times the KL to the base taken off the reward"
    lengths = f"{said.get('max_prompt_length')} of a question, {said.get('max_response_length')} of a response"
    return [
        ("algorithm", f"PPO (`verl.trainer.main_ppo`), a critic that began as {critic}"),
        ("steps", f"{model.num_steps:,} of {batch}"),
        ("learning rates", rates),
        ("KL", kl if said.get("kl_in_reward") else "not in the reward"),
        ("tokens at most", lengths),
        ("nodes", f"{said.get('nnodes')} with {said.get('n_gpus_per_node')} GPUs each"),
        ("mean reward", _rewards(lineage)),
        ("mean score on the test questions", _scores(model)),
        ("digest of the model", code(model.model_digest)),
    ]


def _rewards(lineage: ReinforcedLineage) -> str:
    if not lineage.rewarded:
        return "not measured"
    first, last = lineage.rewarded[0], lineage.rewarded[-1]
    return f"{first['reward']:.4f} at step {first['step']}, {last['reward']:.4f} at step {last['step']}"


def _scores(model: ReinforcedModel) -> str:
    scores = (model.test_score_before, model.test_score_after)
    before, after = ("not measured" if score is None else f"{score:.4f}" for score in scores)
    return f"{before} before, {after} after"


def _data_caveat(lineage: ReinforcedLineage) -> list[str]:
    questions = lineage.questions
    if questions is None:
        return ["Its questions are not known any more: name them in `changes.questions`, else they are the recipe's."]
    if questions.source == "shipped" or hub_id(questions.source):
        return []
    return [local_caveat("questions were", questions.source, questions.revision, "questions.source")]
