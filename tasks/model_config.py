"""What a base's config.json says of the model that is trained, as flat as estimates read it.

    config.json + shapes -> complete_config() -> config with the text model's values on top, nothing null

A config may leave out what its class has a default for, say it as null, or keep a model of text and images' text part
in `text_config`. What is left out is read from the weights' shapes.

Ring: pure.
"""

from collections.abc import Mapping
from statistics import mode
from typing import Any

from tasks.targets import Shapes, layer_number

Config = dict[str, Any]  # Any: config.json


def complete_config(config: Mapping[str, Any], shapes: Shapes) -> Config:  # Any: config.json
    """Return the config with every size that estimates need.

    Args:
        config: as it was read; its model_type stays.
        shapes: parameter name -> shape of the base.

    >>> shapes = {"model.embed_tokens.weight": (10, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
    ...           "model.layers.0.mlp.fc1.weight": (32, 8)}
    >>> complete_config({"model_type": "opt", "num_attention_heads": 2, "head_dim": None}, shapes)["intermediate_size"]
    32
    """
    text = config.get("text_config")
    nested: Mapping[str, Any] = text if isinstance(text, Mapping) else {}  # Any: as above
    values = {**config, **nested, "model_type": config.get("model_type", "")}
    known = {name: value for name, value in values.items() if value is not None}
    return {**_sizes(shapes), **_heads(known, shapes), **known}


def _sizes(shapes: Shapes) -> Config:
    """Return what the shapes tell; of experts or odd layers the widest side: too much rather than too little."""
    matrices = {name: shape for name, shape in shapes.items() if layer_number(name) is not None and len(shape) > 1}
    numbers = [number for name in matrices if (number := layer_number(name)) is not None]
    sides = [side for shape in matrices.values() for side in shape[-2:]]
    return {
        "num_hidden_layers": max(numbers, default=-1) + 1,
        "hidden_size": mode(sides) if sides else 0,  # each matrix has it on one side
        "vocab_size": next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), 0),
        "intermediate_size": max(sides, default=0),
    }


def _heads(known: Mapping[str, Any], shapes: Shapes) -> Config:  # Any: config.json
    """Return how many heads there are of which width, where the config does not say: one, if it says neither."""
    if "num_attention_heads" in known:
        return {}
    outputs = (shape[0] for name, shape in shapes.items() if name.endswith("q_proj.weight") and layer_number(name) == 0)
    wide = next(outputs, 0) or known.get("hidden_size") or _sizes(shapes)["hidden_size"]
    width = known.get("head_dim") or wide
    return {"head_dim": width, "num_attention_heads": max(1, wide // max(1, width))}
