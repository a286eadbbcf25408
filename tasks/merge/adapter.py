"""What an adapter_config.json asks for: refused by name, or a rank and a scale for each target.

Only plain LoRA can be added to a base that PEFT never saw. Everything else that a config can ask for is
refused, and so is a field that this code does not know and that is set: a newer PEFT may mean anything by it.

Ring: pure.
Source: PEFT 0.21: LoraConfig, `get_pattern_key`, LoraModel._create_and_replace.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from tasks.errors import SpecError

_HARMLESS = {  # which weights are adapted is read from the keys; how they were trained does not matter
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config", "runtime_config",
    "megatron_core", "qalora_group_size", "init_lora_weights", "bias", "loftq_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_LABELS = {
    "use_dora": "DoRA",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on lora_B",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}
_SAFE_STARTS = ("gaussian", "eva", "orthogonal", "true", "false")  # the others change the base's weights


def refuse_unsupported(config: Mapping[str, Any]) -> None:  # Any: adapter_config.json
    """Raise SpecError naming what this adapter uses that plain LoRA does not.

    >>> refuse_unsupported({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True, "use_dora": False})
    >>> refuse_unsupported({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True})
    Traceback (most recent call last):
    tasks.errors.SpecError: adapter uses DoRA, which can't be merged here: use PEFT's merge_and_unload
    """
    if config.get("peft_type") != "LORA":
        raise SpecError(f"adapter is of type {config.get('peft_type')}, expected LORA")
    lacking = [name for name in ("r", "lora_alpha") if not isinstance(config.get(name), (int, float))]
    if lacking:
        raise SpecError(f"adapter_config.json has no number for {', '.join(lacking)}: train or copy the adapter again")
    used = [_LABELS.get(name, name) for name, value in config.items() if name not in _HARMLESS and value]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _SAFE_STARTS:
        used.append(f"init_lora_weights={start}, which starts from another base")
    if used:
        raise SpecError(f"adapter uses {', '.join(used)}, which can't be merged here: use PEFT's merge_and_unload")


def rank_and_scale(config: Mapping[str, Any], key: str) -> tuple[int, float]:  # Any: adapter_config.json
    """Return (rank, what B @ A is multiplied by) of the target that PEFT calls `key`.

    The key is the module's name, or the parameter's for an entry of target_parameters.

    >>> config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {r"layers.0.*": 64}}
    >>> rank_and_scale(config, "model.layers.0.q_proj"), rank_and_scale(config, "model.layers.1.k_proj")
    ((16, 4.0), (4, 2.0))
    >>> rank_and_scale({**config, "use_rslora": True}, "model.layers.1.k_proj")
    (4, 4.0)
    """
    rank = _matched(config.get("rank_pattern"), key, config["r"])
    alpha = _matched(config.get("alpha_pattern"), key, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:  # Any: rank or alpha
    """Return the value of the first pattern that ends in `key`, as PEFT's get_pattern_key finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default
