"""Stream the base's shards on the CPU, add the adapter's deltas, write bf16 shards.

    headers -> plan.py -> for each shard: for each tensor: copy | add | dequantise -> rename -> ledger.json

The model is never built: one tensor (of 3-D ones: one expert) is in memory at a time. A delta is
added in float32 and rounded once.

Ring: edge.
"""

import json
import logging
import shutil
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    MergedModel,
    TrainedAdapter,
    digest_files,
    folder_digest,
    make_key,
)
from tasks.errors import CorruptError, MissingError, ShapeError
from tasks.gptoss.mxfp4 import dequantize
from tasks.merge.delta import expert_deltas, linear_delta
from tasks.merge.plan import MergePlan, Output, plan_merge, shard_names
from tasks.specs import MergeSpec

VERSION = 1
LEDGER = "merge_ledger.json"
_DTYPES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}
_NOT_COPIED = {"config.json", "model.safetensors.index.json"}
_SIDE_FILES = (".json", ".jinja", ".model", ".txt")
logger = logging.getLogger(__name__)


class Reader:
    """Random access to the tensors of a folder of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, dict[str, Any]] = {}  # Any: dtype, shape, data_offsets
        self._file_of: dict[str, Path] = {}
        for shard in files.weight_files(folder):
            for name, entry in files.read_safetensors_header(shard)[0].items():
                self.headers[name] = entry
                self._file_of[name] = shard

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from disk."""
        with safe_open(str(self._file_of[name]), framework="pt") as handle:
            return handle.get_tensor(name)

    def experts(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the slices along the first axis, one in memory at a time."""
        with safe_open(str(self._file_of[name]), framework="pt") as handle:
            lazy = handle.get_slice(name)
            for index in range(lazy.get_shape()[0]):
                yield lazy[index]


def merge_adapter(adapter: TrainedAdapter, spec: MergeSpec, store: ArtifactStore) -> MergedModel:
    """Merge the adapter into its base; a second call returns the finished model.

    Raises: SpecError (kind of adapter), ShapeError (does not fit, unused, without effect),
        MissingError or CorruptError (the base is gone or another; torn file, value that is not finite),
        CapacityError (disk).
    """
    key = make_key("merge", VERSION, spec, {"adapter": adapter.adapter_digest}, (adapter,))
    with store.claim(MergedModel, key) as claim:
        if claim.found:
            return claim.found
        require_same_base(adapter, store)
        base, deltas = Reader(Path(adapter.base_folder)), Reader(Path(adapter.adapter_folder))
        config = files.read_json(Path(adapter.adapter_folder) / "adapter_config.json")
        element_bytes = _DTYPES[spec.dtype][1]
        plan = plan_merge(
            base.headers, deltas.headers, config, element_bytes=element_bytes, shard_bytes=spec.shard_bytes
        )
        partial, target = claim.folder / "model.partial", claim.folder / "model"
        if not target.exists():
            written = sum(files.list_files(partial).values()) if partial.exists() else 0
            files.require_disk(claim.folder, plan.total_bytes - written + (64 << 20), "merging")
            ledger = write_model(plan, base, deltas, partial, spec)
            _write_side_files(Path(adapter.base_folder), partial, spec)
            files.write_json(partial / LEDGER, ledger)
            partial.rename(target)
            files.fsync_folder(claim.folder)
        ledger = files.read_json(target / LEDGER)
        digests = {**ledger["shards"], **_side_digests(target, ledger["shards"])}
        artifact = MergedModel(
            key=key,
            folder=str(claim.folder),
            parents=(adapter.ref,),
            model_folder=str(target),
            model_digest=folder_digest(digests),
            base_folder=adapter.base_folder,
            num_tensors=len(plan.outputs),
            num_changed=len(ledger["changes"]),
            num_shards=len(plan.shards),
            total_bytes=plan.total_bytes,
        )
        return claim.commit(artifact, spec=spec, about={"digests": digests, "ledger": ledger["changes"]})


def require_same_base(adapter: TrainedAdapter, store: ArtifactStore) -> None:
    """Raise unless the base is still the one that the adapter was trained on.

    Sizes and times tell in microseconds; when they moved, the files are digested.
    Raises: MissingError when the base is gone, CorruptError when its bytes changed.
    """
    folder = Path(adapter.base_folder)
    if not folder.is_dir():
        raise MissingError(
            f"the base of adapter {adapter.short} was at {folder} and is gone: bring it back, or train again"
        )
    base = store.ancestor(adapter, BaseCheckpoint)
    about = (store.manifest(type(base), base.key) or {}).get("about", {})
    if about.get("stamp") == files.stamp(folder):
        return
    if folder_digest(digest_files(folder)) != adapter.base_digest:
        raise CorruptError(
            f"the base at {folder} is not the one that adapter {adapter.short} was trained on (its files "
            "changed since): bring the old files back, or train on the new ones"
        )


def _side_digests(folder: Path, shards: dict[str, str]) -> dict[str, str]:
    return {name: files.digest(folder / name) for name in files.list_files(folder) if name not in shards}


def write_model(plan: MergePlan, base: Reader, deltas: Reader, folder: Path, spec: MergeSpec) -> dict[str, Any]:
    """Write every shard and the index; shards that an earlier try finished are kept.

    Returns the ledger: {"shards": file -> sha256, "changes": [one entry per changed tensor]}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_strays(folder)  # a kill inside a shard leaves up to 10 GB, which would be digested and published
    names = shard_names(len(plan.shards))
    ledger: dict[str, Any] = {"shards": {}, "changes": []}  # Any: JSON values
    for number, (name, outputs) in enumerate(zip(names, plan.shards, strict=True), start=1):
        record = folder.parent / f"{name}.ledger.json"  # beside the shard, renamed first: a shard without it is redone
        if not (record.exists() and (folder / name).exists()):
            write_shard(outputs, base, deltas, folder / name, record, spec)
        done = files.read_json(record)
        ledger["shards"][name] = done["sha256"]
        ledger["changes"].extend(done["changes"])
        logger.info("merged shard %d/%d, %.2f GB", number, len(names), (folder / name).stat().st_size / 1e9)
    if len(names) > 1:
        weight_map = {o.name: name for name, outputs in zip(names, plan.shards, strict=True) for o in outputs}
        files.write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map},
        )
    return ledger


def write_shard(
    outputs: tuple[Output, ...], base: Reader, deltas: Reader, path: Path, record: Path, spec: MergeSpec
) -> None:
    """Stream one shard to disk, hashing as it goes; then write down what was changed in it."""
    dtype_name, element_bytes = _DTYPES[spec.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Any: safetensors header entries
    offset = 0
    for output in outputs:
        end = offset + output.num_elements * element_bytes
        header[output.name] = {"dtype": dtype_name, "shape": list(output.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    changes: list[dict[str, Any]] = []  # Any: JSON values
    hasher = sha256()
    with files.aside(path) as temporary, temporary.open("wb") as handle:
        _put(handle, hasher, struct.pack("<Q", len(text)) + text)
        for output in outputs:
            norm = 0.0
            for piece, squared in merged_pieces(output, base, deltas, getattr(torch, spec.dtype)):
                norm += squared
                _put(handle, hasher, piece.contiguous().view(torch.uint8).numpy())
            if output.change:
                changes.append(_entry(output, norm**0.5, path.name))
        handle.flush()
    files.write_json(record, {"sha256": hasher.hexdigest(), "changes": changes})


def _put(handle: BinaryIO, hasher: Any, data: Any) -> None:  # Any: hashlib's type is private; bytes or an array
    handle.write(data)
    hasher.update(data)


def _entry(output: Output, norm: float, shard: str) -> dict[str, Any]:  # Any: JSON values
    if norm == 0.0:
        raise ShapeError(f"the adapter's change of {output.name} is zero: its LoRA B never moved from its start")
    assert output.change is not None
    return {
        "tensor": output.name,
        "shape": list(output.shape),
        "lora_A": output.change.a_key,
        "lora_B": output.change.b_key,
        "scale": output.change.scale,
        "delta_norm": norm,
        "shard": shard,
    }


def merged_pieces(
    output: Output, base: Reader, deltas: Reader, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield (piece of the merged tensor in storage order, squared norm of its delta).

    Raises: CorruptError when a value is not finite.
    """
    change = output.change
    if len(output.shape) != 3:
        weight = base.tensor(output.sources[0])
        if change is None:
            yield weight.to(dtype), 0.0
            return
        delta = linear_delta(deltas.tensor(change.a_key), deltas.tensor(change.b_key), scale=change.scale)
        yield _added(output, weight, delta, dtype)
        return
    added = (
        expert_deltas(
            deltas.tensor(change.a_key),
            deltas.tensor(change.b_key),
            num_experts=output.shape[0],
            scale=change.scale,
        )
        if change
        else None
    )
    for weight in _experts(output, base):
        yield _added(output, weight, next(added), dtype) if added else (weight.to(dtype), 0.0)


def _experts(output: Output, base: Reader) -> Iterator[torch.Tensor]:
    if not output.is_quantized:
        yield from base.experts(output.sources[0])
        return
    blocks, scales = (base.experts(name) for name in output.sources)
    for block, scale in zip(blocks, scales, strict=True):
        yield dequantize(block[None], scale[None], torch.bfloat16)[0]


def _added(output: Output, weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    merged = weight.float() + delta
    if not torch.isfinite(merged).all():
        raise CorruptError(f"merging {output.name} gives values that are not finite: base or adapter is damaged")
    return merged.to(dtype), float(delta.double().pow(2).sum())


def _write_side_files(base_folder: Path, folder: Path, spec: MergeSpec) -> None:
    """Copy tokenizer, template and generation config; write the config without a stale quantisation."""
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and path.suffix in _SIDE_FILES and path.name not in _NOT_COPIED:
            with files.aside(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    config = files.read_json(base_folder / "config.json")
    for stale in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    config["dtype"] = spec.dtype
    files.write_json(folder / "config.json", config)
