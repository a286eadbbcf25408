"""The model card of a model that was pretrained here: shape, corpus, tokenizer, steps, losses.

    BaseLineage + PublishSpec -> front matter (YAML) + Markdown; states only what the artifacts say

Ring: pure.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from tasks.artifacts import PretrainedModel
from tasks.publish.card import CURVE, RECIPE, license_row, license_values, local_caveat, table
from tasks.publish.facts import SourceCard
from tasks.publish.names import block, code, hub_id, one_line, shown_spec, without_folder
from tasks.specs import PublishSpec

_SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "intermediate size of an expert",
    "num_local_experts": "experts",
    "num_experts_per_tok": "experts of a token",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "head_dim": "head dimension",
    "vocab_size": "vocabulary",
    "sliding_window": "sliding window",
    "max_position_embeddings": "context, tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLineage:
    """What is known of a pretrained model. `about` is its manifest's, `corpus` the tokenised corpus' fields."""

    model: PretrainedModel
    spec: dict[str, Any]  # PretrainSpec (Any: JSON values)
    config: dict[str, Any]  # config.json
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    corpus: dict[str, Any] = field(default_factory=dict[str, Any])
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # metrics.jsonl
    corpus_card: SourceCard = field(default_factory=SourceCard)
    can_chat: bool = True
    versions: dict[str, str] = field(default_factory=dict[str, str])


def base_card(lineage: BaseLineage, spec: PublishSpec, repo_id: str) -> str:
    """Return README.md with the Hub's front matter."""
    name, model = repo_id.rpartition("/")[2], lineage.model
    parts = [
        f"---\n{_front_matter(lineage, spec)}---\n",
        f"# {one_line(name)}",
        f"A mixture-of-experts language model in the architecture of gpt-oss, {model.num_parameters:,} parameters, "
        "trained from random weights; trained, checked and published by Tatara.",
        block(usage(repo_id), "python"),
        *_chat_caveat(lineage),
        "## Shape",
        table([(said, f"{lineage.config[key]:,}") for key, said in _SHAPE.items() if key in lineage.config]),
        "## What went in",
        table(_sources(lineage, spec)),
        "## Training",
        table(_training(lineage)),
        *([f"![Loss, perplexity, next-token accuracy and learning rate by step]({CURVE})"] if lineage.records else []),
        "## Make it again",
        f"`{RECIPE}` in this repository holds every knob. In a checkout of Tatara, after `tatara up`:",
        block('prefect deployment run pretrain/tiny --watch --params "$(cat recipe.json)"', "bash"),
        *_corpus_caveat(lineage),
        block(json.dumps(base_reproduction(lineage), ensure_ascii=False, indent=2), "json"),
        "## Versions",
        table([(package, code(number)) for package, number in lineage.versions.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def base_reproduction(lineage: BaseLineage) -> dict[str, Any]:  # Any: JSON values
    """Return the parameters of the flow `pretrain` that make this model again.

    Every knob is written out; of a Hub data set the commit that its branch meant.
    """
    pin = _pin(lineage)
    pinned = {"corpus_revision": pin} if pin and hub_id(lineage.spec.get("corpus", "")) else {}
    return {"recipe": "tiny", "changes": {**shown_spec(lineage.spec), **pinned}}


def _front_matter(lineage: BaseLineage, spec: PublishSpec) -> str:
    values: dict[str, Any] = {  # Any: YAML values
        **license_values(lineage.corpus_card, spec),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tatara", "gpt_oss", "pretrained"],
    }
    if hub_id(lineage.spec.get("corpus", "")):
        values["datasets"] = [lineage.spec["corpus"]]
    if lineage.corpus_card.languages:
        values["language"] = list(lineage.corpus_card.languages)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def usage(repo_id: str) -> str:
    """Return how a whole model is loaded."""
    repo = json.dumps(repo_id)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({repo})\ntokenizer = AutoTokenizer.from_pretrained({repo})"
    )


def _chat_caveat(lineage: BaseLineage) -> list[str]:
    if lineage.can_chat:
        return []
    return [
        "Served by vLLM it answers `/v1/completions` only: vLLM reads every chat with a gpt-oss as harmony, whose "
        "token ids this model's own tokenizer does not have, and refuses it."
    ]


def _sources(lineage: BaseLineage, spec: PublishSpec) -> list[tuple[str, str]]:
    said, corpus = lineage.spec, lineage.corpus
    pin = _pin(lineage)
    num_tokens = corpus.get("num_tokens") or lineage.about.get("num_corpus_tokens")
    documents = f", {corpus['num_documents']:,} documents" if corpus.get("num_documents") else ""
    at = f" at {code(pin)}" if pin else ""
    return [
        ("corpus", f"{code(without_folder(said.get('corpus', '')))}{at}{documents}"),
        ("tokens of the corpus", f"{num_tokens:,}" if num_tokens else "not known"),
        license_row("corpus", spec.data_license or lineage.corpus_card.license),
        ("tokenizer", code(without_folder(said.get("tokenizer", "gpt-oss")))),
    ]


def _pin(lineage: BaseLineage) -> str:
    """Return what the corpus' name meant: a commit, or the digest of files."""
    return (lineage.corpus.get("pins") or {}).get("corpus", "")


def _training(lineage: BaseLineage) -> list[tuple[str, str]]:
    model, said = lineage.model, lineage.spec
    rows = f"{said.get('rows_per_step')} rows of {said.get('row_tokens')} tokens"
    optimizer = f"{code(said.get('optimizer', 'adamw'))} at learning rate {said.get('learning_rate', 0):g}"
    return [
        ("optimizer steps", f"{model.num_steps:,} of {rows}, {optimizer}"),
        ("precision", code(said.get("dtype", ""))),
        ("loss", f"{model.first_loss:.4f} at the first step, {model.last_loss:.4f} at the end, nats per token"),
        ("perplexity", f"{math.exp(min(model.last_loss, 80.0)):,.2f} at the end, on text that it learnt"),
        *_held_out(lineage),
        ("digest of the model", code(model.model_digest)),
    ]


def _held_out(lineage: BaseLineage) -> list[tuple[str, str]]:
    loss, share = lineage.model.validation_loss, lineage.spec.get("validation_pct", 0)
    if loss is None:
        return [("held-out loss", "not measured: nothing was held out")]
    perplexity = f"{math.exp(min(loss, 80.0)):,.2f}"
    return [("held-out loss", f"{loss:.4f}, perplexity {perplexity}, on the corpus' last {share:g} %, never learnt")]


def _corpus_caveat(lineage: BaseLineage) -> list[str]:
    source = lineage.spec.get("corpus", "")
    if source in ("shipped", "short_english") or hub_id(source):
        return []
    return [local_caveat("corpus was", source, _pin(lineage), "corpus")]
