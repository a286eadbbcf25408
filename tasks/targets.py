"""Which weights an adapter's targets hit, known from names alone, before anything is loaded.

PEFT matches a name that equals the target or ends with "." + target, and drops a misspelt target
beside a good one without a word. Here a target that hits nothing is an error that lists near names.

Ring: pure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod

from tasks.errors import SpecError
from tasks.gptoss.layout import parameter_name, quantized_stem
from tasks.specs import LoraSpec

_NOT_TARGETS = ("embed_tokens.weight", "lm_head.weight", ".router.weight")
_OTHER_SENSES = re.compile(r"(?:^|\.)(?:vision|visual|audio|image)")  # ..._tower, ..._model, ..._encoder
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One base tensor that gets an adapter. `shape` is as stored; `num_trainable` counts A and B."""

    name: str
    shape: tuple[int, ...]
    num_trainable: int


def is_hit(name: str, target: str) -> bool:
    """Say whether PEFT would put `target` on the module or parameter called `name`.

    >>> is_hit("model.layers.7.mlp.experts.down_proj", "7.mlp.experts.down_proj")
    True
    >>> is_hit("model.layers.17.mlp.experts.down_proj", "7.mlp.experts.down_proj")
    False
    """
    return name == target or name.endswith("." + target)


def loaded_shapes(stored: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return parameter name -> shape of the loaded model from the names and shapes of its files.

    >>> loaded_shapes({"model.layers.0.mlp.experts.down_proj_blocks": (2, 64, 1, 16)})
    {'model.layers.0.mlp.experts.down_proj': (2, 32, 64)}
    """
    shapes: Shapes = {}
    for written, shape in stored.items():
        name = parameter_name(written)
        if name is not None:  # (E, O, I/32, 16) blocks are the transposed (E, I, O) parameter
            shapes[name] = (shape[0], shape[2] * 32, shape[1]) if quantized_stem(written) else shape
    return shapes


def find_targets(shapes: Shapes, lora: LoraSpec) -> list[Target]:
    """Return every weight that `lora` hits.

    Args:
        shapes: parameter name -> shape of the base; a Linear's weight is (out, in), experts are (E, in, out).
        lora: targets and rank.
    Raises: SpecError naming each target that hits nothing, with what exists.
    """
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if _is_linear(name, shape)}
    parameters = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    hits: dict[str, Target] = {}  # a weight that two targets hit gets one adapter
    for kind, targets, candidates in (
        ("target_modules", lora.target_modules, modules),
        ("target_parameters", lora.target_parameters, parameters),
    ):
        for target in targets:
            matched = [name for name in candidates if is_hit(name, target)]
            if not matched:
                raise SpecError(_nothing_hit(kind, target, sorted(candidates)))
            hits |= {name: _target(name, candidates[name], lora.rank) for name in matched}
    return list(hits.values())


def first_trained_layer(targets: Sequence[Target]) -> int:
    """Return the number of the lowest layer with an adapter: the backward pass ends there.

    What lies around the layers may feed the first of them.

    >>> first_trained_layer([Target(name=f"model.layers.{n}.x.weight", shape=(1, 1), num_trainable=2) for n in (9, 7)])
    7
    >>> first_trained_layer([Target(name="model.decoder.project_in.weight", shape=(1, 1), num_trainable=2)])
    0
    """
    return min((layer_number(target.name) or 0 for target in targets), default=0)


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a weight belongs to, None for one around them.

    The layers of an encoder of images or sound are none of the model's of text.

    >>> layer_number("model.layers.17.mlp.down_proj.weight"), layer_number("lm_head.weight")
    (17, None)
    >>> layer_number("model.vision_tower.encoder.layers.3.mlp.fc1.weight")
    """
    number = name.partition(".layers.")[2].partition(".")[0]
    return int(number) if number.isdecimal() and not is_of_encoder(name) else None


def is_of_encoder(name: str) -> bool:
    """Say whether a weight belongs to an encoder of images or sound, which rows of text never reach.

    >>> is_of_encoder("model.vision_tower.encoder.layers.3.mlp.fc1.weight")
    True
    >>> is_of_encoder("model.layers.3.self_attn.vision_expert_dense.weight")
    False
    """
    return bool(_OTHER_SENSES.search(name.partition(".layers.")[0]))


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a weight is a Linear that takes an adapter: the head is the chunked loss's, a router is no Linear."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(_NOT_TARGETS)


def _target(name: str, shape: tuple[int, ...], rank: int) -> Target:
    return Target(name=name, shape=shape, num_trainable=prod(shape[:-2]) * rank * (shape[-1] + shape[-2]))


def _nothing_hit(kind: str, target: str, candidates: list[str]) -> str:
    endings = sorted({".".join(part for part in name.split(".")[-3:]) for name in candidates})
    last = sorted({name.rpartition(".")[2] for name in candidates})
    near = get_close_matches(target, [*last, *endings, *candidates], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    layers = {name.split(".layers.")[1].split(".")[0] for name in candidates if ".layers." in name}
    count = f" in {len(layers)} layers" if layers else ""
    exists = f"existing names end in {', '.join(last)}{count}" if last else "the base has no such weights"
    return f"LoraSpec.{kind} {target!r} hits nothing{hint}; {exists}"


def targets_markdown(targets: list[Target]) -> str:
    """Return the table of what will be trained.

    >>> print(targets_markdown([Target(name="q_proj", shape=(4, 8), num_trainable=24)]))
    1 weights get an adapter, 24 trainable parameters.
    <BLANKLINE>
    | weight | shape | trainable |
    |---|---|---:|
    | `q_proj` | 4 × 8 | 24 |
    """
    rows = [f"| `{t.name}` | {' × '.join(map(str, t.shape))} | {t.num_trainable:,} |" for t in targets]
    total = sum(t.num_trainable for t in targets)
    head = f"{len(targets)} weights get an adapter, {total:,} trainable parameters.\n"
    return "\n".join([head, "| weight | shape | trainable |", "|---|---|---:|", *rows])
