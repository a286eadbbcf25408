"""The model card, generated from the artifacts that led to the model.

Ring: pure.
"""

from dataclasses import dataclass
from typing import Any

from tasks.artifacts import BaseCheckpoint, FetchedDataset, MergedModel, PackedDataset, TrainedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The artifacts behind one merged model, and the knobs of its training."""

    base: BaseCheckpoint
    dataset: FetchedDataset
    packed: PackedDataset
    adapter: TrainedAdapter
    merged: MergedModel
    train_spec: dict[str, Any]  # Any: JSON values


def model_card(lineage: Lineage) -> str:
    """Return README.md with the Hub's front matter; states only what the artifacts say."""
    adapter, merged, spec = lineage.adapter, lineage.merged, lineage.train_spec
    lora = spec["lora"]
    targets = ", ".join(f"`{name}`" for name in (*lora["target_modules"], *lora["target_parameters"]))
    return f"""---
{_front_matter(lineage)}---

# Model {merged.short}

A LoRA fine-tune, merged into its base and stored as safetensors; made by Tatara.

| | |
|---|---|
| base | {lineage.base.origin} ({lineage.base.num_parameters:,} parameters) |
| data | {lineage.dataset.source} at `{lineage.dataset.revision[:16]}`, {lineage.dataset.num_train_rows} training and \
{lineage.dataset.num_validation_rows} validation rows |
| tokens | {lineage.packed.num_train_tokens:,}, of which {lineage.packed.num_learnt_tokens:,} are learnt |
| LoRA | rank {lora["rank"]}, alpha {lora["alpha"]}, on {targets} |
| steps | {adapter.num_steps} at learning rate {spec["learning_rate"]:g} |
| training loss | {adapter.first_loss:.4f} at the first step, {adapter.last_loss:.4f} at the last |
| validation loss | {adapter.validation_loss_before:.4f} before, {adapter.validation_loss_after:.4f} after |
| merge | {merged.num_changed} of {merged.num_tensors} tensors changed; `merge_ledger.json` lists them |
| digest | `{merged.model_digest}` |
"""


def _front_matter(lineage: Lineage) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- tatara", "- lora"]
    name = lineage.base.origin.partition("@")[0]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        lines.append(f"base_model: {name}")
    return "".join(f"{line}\n" for line in lines)
