"""Gather what is published in one folder: hard links of weights, the card, the curve, the recipe. Costs no disk.

    merged:  model files              + README.md, recipe.json, loss_curve.png
    adapter: adapter and tokenizer    + the same
    both:    model files, adapter/ without a second tokenizer + the same
    a whole model, pretrained or trained with rewards: its files + the same

Ring: edge (disk).
"""

import shutil
from pathlib import Path
from typing import Any

from tasks import files
from tasks.pictures import loss_curve, ppo_curves, training_panels
from tasks.publish.base_card import BaseLineage, base_card, base_reproduction
from tasks.publish.card import ADAPTER_FOLDER, CURVE, RECIPE, REWARD_CURVE, model_card
from tasks.publish.facts import Lineage, reproduction
from tasks.publish.plan import CARD
from tasks.publish.reinforced_card import ReinforcedLineage, reinforced_card, reinforced_reproduction
from tasks.specs import PublishSpec

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)


def stage(lineage: Lineage, spec: PublishSpec, repo_id: str, folder: Path) -> Path:
    """Fill `folder`, which is emptied first. Raises MissingError when the adapter's files are gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if lineage.merged is not None and spec.what != "adapter":
        link_all(Path(lineage.merged.model_folder), folder)
    if spec.what != "merged":
        _stage_adapter(lineage, folder / ADAPTER_FOLDER if spec.what == "both" else folder)
    if spec.what == "adapter":
        _stage_tokenizer(Path(lineage.base.model_folder), folder)
    files.write_text(folder / CARD, model_card(lineage, spec, repo_id))
    files.write_json(folder / RECIPE, reproduction(lineage))
    if lineage.records:
        files.write_bytes(folder / CURVE, _curve(lineage))
    return folder


def stage_whole(lineage: BaseLineage | ReinforcedLineage, spec: PublishSpec, repo_id: str, folder: Path) -> Path:
    """Fill `folder`, which is emptied first, with a model that was trained as a whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = lineage.model
    link_all(Path(model.model_folder), folder)
    if isinstance(lineage, ReinforcedLineage):
        card, recipe = reinforced_card(lineage, spec, repo_id), reinforced_reproduction(lineage)
        curve, draw = REWARD_CURVE, lambda: ppo_curves(lineage.records, f"PPO {model.short}")
    else:
        card, recipe = base_card(lineage, spec, repo_id), base_reproduction(lineage)
        curve, draw = CURVE, lambda: training_panels(lineage.records, f"Pretraining {model.short}")
    files.write_text(folder / CARD, card)
    files.write_json(folder / RECIPE, recipe)
    if any(key in record for record in lineage.records for key in ("loss", "reward")):
        files.write_bytes(folder / curve, draw())
    return folder


def _stage_adapter(lineage: Lineage, folder: Path) -> None:
    source = Path(lineage.adapter.adapter_folder)
    for path in files.weight_files(source):
        link(path, folder / path.name)
    config: dict[str, Any] = files.read_json(source / "adapter_config.json")  # Any: PEFT's own values
    # PEFT wrote the folder that the base had on this machine: nobody else could load it from there
    config["base_model_name_or_path"] = lineage.base_id or None
    config["revision"] = lineage.base_commit or None
    files.write_json(folder / "adapter_config.json", config)


def _stage_tokenizer(base: Path, folder: Path) -> None:
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in base.glob(pattern) if path.is_file()}):
        link(path, folder / path.name)


def _curve(lineage: Lineage) -> bytes:
    adapter = lineage.adapter
    marks = {"validation before": adapter.validation_loss_before, "validation after": adapter.validation_loss_after}
    return loss_curve(lineage.records, f"Adapter {adapter.short}", marks, lineage.evaluations)


def link_all(source: Path, target: Path) -> None:
    """Link every file below `source` to the same name below `target`."""
    for name in files.list_files(source):
        link(source / name, target / name)


def link(source: Path, target: Path) -> None:
    """Make a hard link; a copy on another file system, or one without hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        with files.aside(target) as temporary:
            shutil.copyfile(source, temporary)
