"""What is known of a model that is published: values only, collected by lineage.py and told by card.py.

Ring: pure.
"""

from dataclasses import dataclass, field
from typing import Any

from tasks.artifacts import (
    BaseCheckpoint,
    FetchedDataset,
    MergedModel,
    PackedDataset,
    PretrainedModel,
    TrainedAdapter,
)
from tasks.publish.names import hub_id, hub_origin, shown_spec, without_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """What the card of a base or a data set says; empty where it says nothing."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The artifacts behind one model, their knobs, and what was measured on the way."""

    base: BaseCheckpoint
    dataset: FetchedDataset
    packed: PackedDataset
    adapter: TrainedAdapter
    merged: MergedModel | None
    specs: dict[str, dict[str, Any]]  # verb -> knobs (Any: JSON values)
    changes: list[dict[str, Any]] = field(default_factory=list)  # the merge's ledger, one entry a tensor
    records: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    base_card: SourceCard = SourceCard()
    data_card: SourceCard = SourceCard()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def base_id(self) -> str:
        """The base's name on the Hub, "" when it was made here or lies in a folder."""
        return hub_origin(self.base.origin)[0]

    @property
    def base_commit(self) -> str:
        """The commit of a base from the Hub."""
        return hub_origin(self.base.origin)[1]

    @property
    def is_made_here(self) -> bool:
        """Whether the base was trained from scratch by Tatara."""
        return isinstance(self.base, PretrainedModel)

    @property
    def is_reinforced(self) -> bool:
        """Whether the adapter learnt from rewards."""
        return "rewards" in self.specs.get("train", {})


def _is_sft(spec: Any) -> bool:  # Any: JSON values
    return isinstance(spec, dict) and "rewards" not in spec


def reproduction(lineage: Lineage) -> dict[str, Any]:  # Any: JSON values
    """Return the parameters of the flow that makes this model again: `finetune`, or `reinforce`.

    Every knob up to the merge is written out but where it ran, and moving names (a branch of the data, of the base) are
    replaced by the commits that they meant; of the named recipe only what comes after counts.
    """
    specs = {verb: shown_spec(spec) for verb, spec in lineage.specs.items()}
    changes: dict[str, Any] = {verb: specs[verb] for verb in ("fetch", "pack", "train", "merge") if verb in specs}
    if lineage.is_reinforced:
        changes["reinforce"] = changes.pop("train")
        changes |= {"warm_start": specs["warm_start"]} if _is_sft(specs.get("warm_start")) else {}
    if "fetch" in changes and hub_id(lineage.dataset.source):
        changes["fetch"]["revision"] = lineage.dataset.revision
    if lineage.is_made_here:
        changes["base"] = {"model": "pretrain:tiny"}
        tiny = "tiny_grpo" if lineage.is_reinforced else "tiny"
        return {"recipe": tiny, "changes": changes, "base_changes": specs.get("base", {})}
    changes["base"] = {
        "model": without_folder(lineage.base_id or lineage.base.origin),
        "revision": lineage.base_commit or "main",
    }
    if lineage.is_reinforced:
        return {"recipe": "gptoss20b_grpo_h100", "changes": changes}
    is_quantized = specs.get("train", {}).get("quantization", "none") != "none"
    return {"recipe": "qwen_qlora_16gb" if is_quantized else "gptoss20b_lora_h100", "changes": changes}


def command(lineage: Lineage) -> str:
    """Return the one command that runs `recipe.json`."""
    recipe = reproduction(lineage)["recipe"]
    deployment = {"tiny": "tiny", "tiny_grpo": "tiny", "qwen_qlora_16gb": "qlora-16gb"}.get(recipe, "h100")
    flow = "reinforce" if lineage.is_reinforced else "finetune"
    return f'prefect deployment run {flow}/{deployment} --watch --params "$(cat recipe.json)"'
