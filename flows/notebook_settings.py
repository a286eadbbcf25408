"""The one settings cell of notebooks/finetune_colab.ipynb, turned into a Recipe.

    {"BASE_MODEL_ID": ..., "LORA_R": 64, ...} -> recipe_from_settings() -> Recipe

The names are those of the Colab seed's template; docs/colab.md lists what each becomes. What is left out keeps the
value of `qwen_qlora_16gb`, so hyper-parameters are still chosen in flows/recipes.py alone.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flows.recipes import resolve
from tasks.errors import SpecError
from tasks.specs import Recipe, change

_BASE_RECIPE = "qwen_qlora_16gb"


# name -> (type of its value, example for the error, field of the Recipe that it becomes, "" for none)
SETTINGS: dict[str, tuple[type, str, str]] = {
    "PROJECT_NAME": (str, '"my-first-adapter"', "serve.served_model_name"),
    "BASE_SAVE_DIR": (str, '"/content/drive/MyDrive/llm-finetune"', ""),
    "BASE_MODEL_ID": (str, '"Qwen/Qwen2.5-7B-Instruct"', "base.model"),
    "USE_4BIT": (bool, "True", "train.quantization"),
    "DATASET_ID": (str, '"shipped"', "fetch.source"),
    "DATASET_SPLIT": (str, '"train"', "fetch.split"),
    "TEXT_COLUMN": (str, '"text", or "" for chats', "fetch.text_column"),
    "MAX_SEQ_LENGTH": (int, "1024", "pack.row_tokens"),
    "PACKING": (bool, "True", "pack.packing"),
    "LORA_R": (int, "64", "train.lora.rank"),
    "LORA_ALPHA": (int, "16", "train.lora.alpha"),
    "LORA_DROPOUT": (float, "0.05", "train.lora.dropout"),
    "LORA_TARGET_MODULES": (list, '["q_proj", "v_proj"]', "train.lora.target_modules"),
    "BATCH_SIZE": (int, "1", "train.rows_per_device"),
    "GRADIENT_ACCUMULATION_STEPS": (int, "16", "train.gradient_accumulation"),
    "LEARNING_RATE": (float, "2e-4", "train.learning_rate"),
    "NUM_TRAIN_EPOCHS": (float, "2", "train.num_epochs"),
    "WARMUP_STEPS": (int, "100", "train.warmup_steps"),
    "LOGGING_STEPS": (int, "10", "train.log_steps"),
    "SAVE_STEPS": (int, "500", "train.save_steps"),
    "MAX_STEPS": (int, "-1", "train.max_steps"),
    "HUB_REPO_ID": (str, '"" (nothing is pushed) or "owner/name"', "publish.repo_id"),
    "CHANGES": (dict, '{"fetch": {"max_rows": 1000}}', ""),
}


def recipe_from_settings(settings: Mapping[str, Any]) -> Recipe:  # Any: a cell's values
    """Return the recipe that a settings cell means.

    Args:
        settings: names of `SETTINGS`; each may be left out. `CHANGES` holds any other field of the recipe, and wins.
    Raises: SpecError listing every misspelt name (with near ones), wrong type, and value out of range.

    >>> recipe_from_settings({"LORA_R": 8, "TEXT_COLUMN": "text"}).pack.loss_on
    'all'
    >>> recipe_from_settings({"LORA_RANK": 8})
    Traceback (most recent call last):
    ...
    tasks.errors.SpecError: there is no setting LORA_RANK: did you mean LORA_R, LORA_ALPHA?
    """
    faults = [fault for name, value in settings.items() if (fault := _fault(name, value))]
    if faults:
        raise SpecError("; ".join(faults))
    fields: dict[str, Any] = {}  # Any: nested dicts of JSON values
    for name, value in settings.items():
        if path := SETTINGS[name][2]:
            _put(fields, path.split("."), _converted(name, value))
    if settings.get("TEXT_COLUMN"):
        _put(fields, ["pack", "loss_on"], "all")
    recipe = _change(resolve(_BASE_RECIPE), fields)
    needed = recipe.pack.row_tokens + 1  # what is trained can be asked for, and answered
    rest = {"serve": {"max_model_len": max(recipe.serve.max_model_len, 2 * needed)}, "publish": {"what": "adapter"}}
    return change(change(recipe, rest), settings.get("CHANGES"))


def output_folder(settings: Mapping[str, Any]) -> Path:  # Any: a cell's values
    """Return BASE_SAVE_DIR/PROJECT_NAME, where artifacts, checkpoints and final/ lie. Raises SpecError."""
    name, root = settings.get("PROJECT_NAME", ""), settings.get("BASE_SAVE_DIR", "")
    if not isinstance(name, str) or not name or name.startswith(".") or "/" in name:
        raise SpecError(f"PROJECT_NAME = {name!r}: expected the name of one folder, such as my-first-adapter")
    if not isinstance(root, str) or not root:
        raise SpecError(f"BASE_SAVE_DIR = {root!r}: expected a folder, such as /content/drive/MyDrive/llm-finetune")
    return Path(root).expanduser() / name


def _fault(name: str, value: Any) -> str:  # Any: whatever a person typed
    """Say what is wrong with a name or the type of its value; "" when nothing is."""
    if name not in SETTINGS:
        near = get_close_matches(str(name).upper(), SETTINGS, n=2, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else f"settings are {', '.join(SETTINGS)}"
        return f"there is no setting {name}: {hint}"
    wanted, example, _ = SETTINGS[name]
    if wanted is list:
        is_right = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    elif wanted in (int, float):
        is_right = isinstance(value, (int, wanted)) and not isinstance(value, bool)
    else:
        is_right = isinstance(value, wanted)
    return "" if is_right else f"{name} = {value!r}: expected {example}"


def _converted(name: str, value: Any) -> Any:  # Any: as above
    if name == "USE_4BIT":
        return "nf4" if value else "none"
    return tuple(value) if isinstance(value, list) else value


def _put(fields: dict[str, Any], path: list[str], value: Any) -> None:  # Any: as above
    for name in path[:-1]:
        fields = fields.setdefault(name, {})
    fields[path[-1]] = value


def _change(recipe: Recipe, fields: dict[str, Any]) -> Recipe:  # Any: as above
    """Apply the settings; an error names the setting and not only the field that it became."""
    try:
        return change(recipe, fields)
    except SpecError as error:
        said = str(error)
        for name, (_, _, field) in SETTINGS.items():
            said = said.replace(f"Recipe.{field} =", f"{name} (Recipe.{field}) =") if field else said
        raise SpecError(said) from None
