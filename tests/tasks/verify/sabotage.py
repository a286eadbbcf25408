"""Model folders that a broken merge, a broken server or a mistaken person would put in the merged one's place.

Each takes the merged folder, the base's and where to write, and leaves a folder that loads without an error.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def _rewrite(merged: Path, base: Path, target: Path, change: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]):
    """Copy the merged folder with each tensor as `change(name, merged, base)` says."""
    shutil.copytree(merged, target)
    was = {name: tensor for path in sorted(base.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for path in sorted(target.glob("*.safetensors")):
        tensors = {name: change(name, w, was[name].to(w.dtype)) for name, w in load_file(path).items()}
        path.unlink()  # it may be a hard link of what it was copied from
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return target


def experts_dropped(merged: Path, base: Path, target: Path) -> Path:
    """The deltas of the experts are lost, those of attention are there (unsloth-zoo PR 885)."""
    return _rewrite(merged, base, target, lambda name, w, b: b if ".experts." in name else w)


def gate_up_swapped(merged: Path, base: Path, target: Path) -> Path:
    """Gate and up change places in each interleaved pair."""

    def swap(name: str, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if "gate_up_proj" in name else w

    return _rewrite(merged, base, target, swap)


def delta_twice(merged: Path, base: Path, target: Path) -> Path:
    """Every delta is added twice."""
    return _rewrite(merged, base, target, lambda name, w, b: (2 * w.float() - b.float()).to(w.dtype))


def base_served(merged: Path, base: Path, target: Path) -> Path:
    """The base under the new name."""
    return _rewrite(merged, base, target, lambda name, w, b: b)


def stale_tokenizer(merged: Path, base: Path, target: Path) -> Path:
    """The weights are right; the tokenizer lacks its last merges, as an older one would."""
    shutil.copytree(merged, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]
    path.unlink()
    path.write_text(json.dumps(content, ensure_ascii=False))
    return target


OF_WEIGHTS = (experts_dropped, gate_up_swapped, delta_twice, base_served)
