"""What the weights of a base take while an adapter trains: each tensor on the GPU, and layers that rest on the host.

Ring: pure.  Units: bytes.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from tasks.errors import SpecError
from tasks.specs import TrainSpec
from tasks.targets import Shapes, Target, first_trained_layer, layer_number

_STORED = {"nf4": 0.52, "int8": 1.0}  # bytes of a quantised weight, scales included
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
Config = Mapping[str, Any]  # Any: config.json


def resting_bytes(shapes: Shapes, config: Config, spec: TrainSpec, num_offloaded: int) -> list[int]:
    """Return what each of the lowest `num_offloaded` layers holds in the host's memory: its matrices and experts.

    Experts that are stored in MXFP4 rest as they are stored.

    >>> from tasks.specs import LoraSpec
    >>> shapes = {"m.layers.0.q.weight": (8, 4), "m.layers.0.norm.weight": (8,), "m.layers.1.q.weight": (9, 4)}
    >>> resting_bytes(shapes, {}, TrainSpec(lora=LoraSpec(target_modules=("q",))), 1)
    [64]
    """
    sizes = stored_sizes(shapes, spec)
    if rests_packed(config, spec):
        sizes |= {name: prod(shape) * 17 // 32 for name, shape in shapes.items() if is_expert(name, shape)}
    return matrix_bytes(shapes, sizes, num_offloaded)


def num_unpacked(shapes: Shapes, config: Config, spec: TrainSpec, num_offloaded: int) -> int:
    """Return how many weights are unpacked in a pass: those of resting experts that are stored in MXFP4."""
    if not rests_packed(config, spec):
        return 0
    ones = {name: prod(shape) if is_expert(name, shape) else 0 for name, shape in shapes.items()}
    return sum(matrix_bytes(shapes, ones, num_offloaded))


def matrix_bytes(shapes: Shapes, sizes: Mapping[str, int], num_layers: int) -> list[int]:
    """Return what each of the lowest layers takes without its vectors, which stay on the GPU."""
    layers = dict.fromkeys(range(num_layers), 0)
    for name, size in sizes.items():
        if (layer := layer_number(name)) in layers and len(shapes[name]) > 1:
            layers[layer] += size
    return list(layers.values())


def rests_packed(config: Config, spec: TrainSpec) -> bool:
    """Say whether experts rest in MXFP4, as they are stored."""
    return spec.quantization == "none" and bool(config.get("quantization_config"))


def require_offloadable(config: Config, spec: TrainSpec, targets: list[Target]) -> None:
    """Raise SpecError when layers that should rest on the host hold an adapter, or have one below them."""
    lowest = first_trained_layer(targets)
    if spec.offload_layers > lowest or (spec.offload_layers and not lowest):
        num_layers = config.get("num_hidden_layers", 0)
        raise SpecError(
            f"TrainSpec.offload_layers = {spec.offload_layers} but the lowest adapter sits in layer {lowest} of "
            f"{num_layers}: only layers below it can rest on the host. Put the adapter on the last layers "
            f"(LoraSpec.target_modules such as '{max(0, num_layers - 1)}.self_attn.q_proj'), or set it to {lowest}"
        )


def stored_sizes(shapes: Shapes, spec: TrainSpec) -> dict[str, int]:
    """Return what each parameter takes as it is held in training."""
    element = 4 if spec.dtype == "float32" else 2
    return {name: round(prod(size) * _stored_bytes(name, size, spec, element)) for name, size in shapes.items()}


def _stored_bytes(name: str, size: tuple[int, ...], spec: TrainSpec, element: int) -> float:
    """Of a quantised base the Linear weights are stored in less; embeddings, head, norms and experts stay."""
    is_linear = len(size) == 2 and ".layers." in name and name.endswith(".weight") and not is_expert(name, size)
    return _STORED[spec.quantization] if is_linear and spec.quantization != "none" else element


def is_expert(name: str, size: tuple[int, ...]) -> bool:
    """Say whether a stored tensor is of 3-D experts: of all of them, or of one that transformers stacks as it loads.

    >>> is_expert("model.layers.0.mlp.experts.7.up_proj.weight", (768, 2048))
    True
    >>> is_expert("model.layers.0.mlp.shared_experts.up_proj.weight", (768, 2048))
    False
    """
    return len(size) == 3 or bool(_ONE_EXPERT.search(name))
