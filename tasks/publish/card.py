"""The model card, generated from the artifacts that led to the model.

    Lineage + PublishSpec -> front matter (YAML) + Markdown; states only what the artifacts say

Names that others chose are written as inline code: no data set's name breaks a table or the front matter.

Ring: pure.
"""

import json
import math
import re
from typing import Any

import yaml

from tasks.artifacts import BaseCheckpoint, TrainedModel
from tasks.publish.facts import Lineage, SourceCard, command, reproduction
from tasks.publish.names import block, code, hub_id, hub_origin, one_line, without_folder
from tasks.specs import PublishSpec

CURVE, REWARD_CURVE, RECIPE, ADAPTER_FOLDER = "loss_curve.png", "reward_curve.png", "recipe.json", "adapter"
_SHOWN_CHANGES = 3
Row = tuple[str, str]


def model_card(lineage: Lineage, spec: PublishSpec, repo_id: str) -> str:
    """Return README.md with the Hub's front matter.

    Args:
        lineage: what is known.
        spec: what is published, and licences that a person stated.
        repo_id: where it goes.
    """
    name = repo_id.rpartition("/")[2]
    parts = [
        f"---\n{front_matter(lineage, spec, name)}---\n",
        f"# {one_line(name)}",
        _intro(lineage, spec),
        block(_usage(lineage, spec, repo_id), "python"),
        "## What went in",
        table(_sources(lineage, spec)),
        "## Training",
        table(_training(lineage)),
        *([f"![Training loss by step, validation loss before and after]({CURVE})"] if lineage.records else []),
        *_merge(lineage, spec),
        "## Make it again",
        f"`{RECIPE}` in this repository holds every knob. In a checkout of Tatara, after `tatara up`:",
        block(command(lineage), "bash"),
        *base_caveat(lineage.base),
        *_data_caveat(lineage),
        block(json.dumps(reproduction(lineage), ensure_ascii=False, indent=2), "json"),
        "## Versions",
        table([(package, code(number)) for package, number in lineage.versions.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(lineage: Lineage, spec: PublishSpec, name: str) -> str:
    """Return the metadata of the card as YAML."""
    values: dict[str, Any] = {  # Any: YAML values
        **license_values(lineage.base_card, spec),
        "library_name": "peft" if spec.what == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "tatara",
            "lora",
            "grpo" if lineage.is_reinforced else "sft",
            *(["qlora"] if _is_quantized(lineage) else []),
        ],
    }
    if lineage.base_id:
        values["base_model"] = lineage.base_id
        values["base_model_relation"] = "adapter" if spec.what == "adapter" else "finetune"
    if hub_id(lineage.dataset.source):
        values["datasets"] = [lineage.dataset.source]
    languages = [name for name in lineage.data_card.languages if re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", name)]
    if languages:  # only codes: the Hub refuses the whole card for one that is none
        values["language"] = languages
    if math.isfinite(lineage.adapter.validation_loss_after):
        values["model-index"] = [{"name": one_line(name), "results": [_result(lineage)]}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def license_values(base: SourceCard, spec: PublishSpec) -> dict[str, str]:
    """Return the licence for the front matter: what a person stated, else that of the source."""
    if spec.license:
        return {"license": spec.license}
    named = {"license": base.license, "license_name": base.license_name, "license_link": base.license_link}
    return {key: one_line(value) for key, value in named.items() if value} or {"license": "unknown"}


def _result(lineage: Lineage) -> dict[str, Any]:  # Any: YAML values
    source = one_line(without_folder(lineage.dataset.source)) or "data"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{source} (validation rows)", "type": hub_id(lineage.dataset.source) or "local"},
        "metrics": [
            {
                "type": "loss",
                "value": round(lineage.adapter.validation_loss_after, 6),
                "name": "validation loss, nats per token",
            }
        ],
    }


def _is_quantized(lineage: Lineage) -> bool:
    return lineage.specs.get("train", {}).get("quantization", "none") != "none"


def _intro(lineage: Lineage, spec: PublishSpec) -> str:
    base = f"[{lineage.base_id}](https://huggingface.co/{lineage.base_id})" if lineage.base_id else "a base made here"
    made = {
        "adapter": f"A LoRA adapter (PEFT) for {base}",
        "merged": f"A LoRA fine-tune of {base}, merged into its base and stored as safetensors",
        "both": f"A LoRA fine-tune of {base}, merged into its base; the adapter alone is in `{ADAPTER_FOLDER}/`",
    }
    return f"{made[spec.what]}; trained, checked and published by Tatara."


def _usage(lineage: Lineage, spec: PublishSpec, repo_id: str) -> str:
    repo = json.dumps(repo_id)
    load = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if spec.what == "adapter":
        base = json.dumps(lineage.base_id or "the base's folder")
        return (
            f"from peft import PeftModel\n{load}"
            f"base = AutoModelForCausalLM.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(base, {repo})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({repo})"
        )
    return (
        f"{load}model = AutoModelForCausalLM.from_pretrained({repo})\ntokenizer = AutoTokenizer.from_pretrained({repo})"
    )


def _sources(lineage: Lineage, spec: PublishSpec) -> list[Row]:
    dataset = lineage.dataset
    rows = f"{dataset.num_train_rows:,} training and {dataset.num_validation_rows:,} validation rows"
    return [
        *base_rows(lineage.base, lineage.base_card),
        ("data", f"{code(without_folder(dataset.source))} at {code(dataset.revision)}, {rows}"),
        license_row("data", spec.data_license or lineage.data_card.license),
        ("tokens", f"{lineage.packed.num_train_tokens:,}, of which {lineage.packed.num_learnt_tokens:,} are learnt"),
    ]


def base_rows(base: BaseCheckpoint, card: SourceCard) -> list[Row]:
    """Return what a card tells of the base that a model was made of."""
    return [
        ("base", f"{code(without_folder(base.origin))}, {base.num_parameters:,} parameters"),
        license_row("base", card.license),
    ]


def license_row(what: str, license: str) -> Row:
    """Return what a card tells of a licence."""
    return (f"licence of the {what}", code(license) if license else "not known")


def base_caveat(base: BaseCheckpoint) -> list[str]:
    """Return what is said of a base that was a folder."""
    if isinstance(base, TrainedModel) or hub_origin(base.origin)[0]:
        return []
    return [local_caveat("base was", base.origin, base.model_digest, "base.model")]


def local_caveat(what: str, name: str, digest: str, field: str) -> str:
    """Return what is said of a file or folder of the machine that made the model; its digest is empty when lost."""
    known = f" with the digest {code(digest)}" if digest else ""
    return f"The {what} a local file or folder, {code(without_folder(name))}{known}: name yours in `changes.{field}`."


def _training(lineage: Lineage) -> list[Row]:
    adapter, spec = lineage.adapter, lineage.specs.get("train", {})
    lora = spec.get("lora", {})
    targets = [*lora.get("target_modules", ()), *lora.get("target_parameters", ())]
    return [
        ("LoRA", f"rank {lora.get('rank')}, alpha {lora.get('alpha')}, on {', '.join(code(name) for name in targets)}"),
        ("trained parameters", f"{adapter.num_trainable:,}"),
        ("base in training", code(spec["quantization"]) if _is_quantized(lineage) else "not quantised"),
        ("optimizer steps", f"{adapter.num_steps:,} at learning rate {spec.get('learning_rate', 0):g}"),
        ("training loss", f"{adapter.first_loss:.4f} at the first step, {adapter.last_loss:.4f} at the last"),
        ("validation loss", f"{adapter.validation_loss_before:.4f} before, {adapter.validation_loss_after:.4f} after"),
        *_rewards(lineage),
        ("digest of the adapter", code(adapter.adapter_digest)),
    ]


def _rewards(lineage: Lineage) -> list[Row]:
    if not lineage.is_reinforced:
        return []
    adapter, rewards = lineage.adapter, lineage.specs["train"]["rewards"]
    named = ", ".join(f"{each['weight']:g} × {code(each['name'])}" for each in rewards)
    return [
        ("rewards (GRPO)", named),
        ("mean reward", f"{adapter.reward_before:.4f} in the first tenth, {adapter.reward_after:.4f} in the last"),
    ]


def _merge(lineage: Lineage, spec: PublishSpec) -> list[str]:
    merged = lineage.merged
    if merged is None or spec.what == "adapter":
        return []
    rows = [
        ("changed", f"{merged.num_changed:,} of {merged.num_tensors:,} tensors; `merge_ledger.json` lists each"),
        ("size", f"{merged.total_bytes / 1e9:.3f} GB in {merged.num_shards} shard(s)"),
        ("digest of the model", code(merged.model_digest)),
    ]
    sized = [entry for entry in lineage.changes if isinstance(entry.get("delta_norm"), (int, float))]
    for entry in sorted(sized, key=lambda entry: -entry["delta_norm"])[:_SHOWN_CHANGES]:
        rows.append(("largest changes", f"{code(str(entry.get('tensor')))}: norm {entry['delta_norm']:.4g}"))
    return ["## Merge", table(rows)]


def _data_caveat(lineage: Lineage) -> list[str]:
    if lineage.dataset.source.startswith("shipped") or hub_id(lineage.dataset.source):
        return []
    return [local_caveat("data was", lineage.dataset.source, lineage.dataset.revision, "fetch.source")]


def table(rows: list[Row]) -> str:
    """Return a table of two columns; the cells are Markdown already."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
