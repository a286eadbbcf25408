"""Stream the base's shards on the CPU, add the adapter's deltas, write the merged shards.

    headers -> plan.py -> shards, four at a time: stream.py (copy | add | convert) -> writer.py (write, hash) -> rename
                     and beside it worker.py: PEFT's own deltas, compared in the end -> merge_ledger.json -> rename

The model is never built: a few megabytes are in memory at a time. A delta is added in float32 and rounded
once; what the adapter does not touch is copied as bytes.

Ring: edge.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from tasks.errors import CapacityError, CorruptError, MissingError, ShapeError
from tasks.gptoss.mxfp4 import QUANTIZATION_CONFIG
from tasks.merge.output import goes_past_cache
from tasks.merge.peft_check import PeftSide
from tasks.merge.plan import MergePlan, Output, plan_merge, shard_names
from tasks.merge.reader import Reader
from tasks.merge.shard import write_shard
from tasks.merge.writer import makers
from tasks.models import require_mxfp4
from tasks.specs import MergeSpec

VERSION = 2
LEDGER = "merge_ledger.json"
_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json"}
_SIDE_FILES = (".json", ".jinja", ".model", ".txt")
_MOST_SHARDS, _MOST_MAKERS = 4, 8  # at a time: 5 GB/s of sha256; more threads than that wait for Python's lock
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
logger = logging.getLogger(__name__)


def merge_adapter(adapter: TrainedAdapter, spec: MergeSpec, store: ArtifactStore) -> MergedModel:
    """Merge the adapter into its base; a second call returns the finished model.

    Raises: SpecError (kind of adapter), ShapeError (does not fit, unused, without effect, not PEFT's delta),
        MissingError or CorruptError (the base is gone or another; torn file, value that is not finite),
        CapacityError (disk).
    """
    key = make_key("merge", VERSION, spec, {"adapter": adapter.adapter_digest}, (adapter,))
    with store.claim(MergedModel, key) as claim:
        if claim.found:
            return claim.found
        require_same_base(adapter, store)
        target = claim.folder / "model"
        if not target.exists():
            merge_folders(Path(adapter.base_folder), Path(adapter.adapter_folder), target, spec)
        ledger = files.read_json(target / LEDGER)
        digests = {**ledger["shards"], **_side_digests(target, ledger["shards"])}
        artifact = MergedModel(
            key=key,
            folder=str(claim.folder),
            parents=(adapter.ref,),
            model_folder=str(target),
            model_digest=folder_digest(digests),
            base_folder=adapter.base_folder,
            num_tensors=ledger["num_tensors"],
            num_changed=len(ledger["changes"]),
            num_shards=len(ledger["shards"]),
            total_bytes=ledger["total_bytes"],
            experts=spec.experts,
            mxfp4_error=max((row["mxfp4_error"] for row in ledger["requantized"]), default=0.0),
        )
        about = {"digests": digests, "ledger": ledger["changes"], "peft": ledger["peft"]}
        return claim.commit(artifact, spec=spec, about={**about, "requantized": ledger["requantized"]})


def merge_folders(base_folder: Path, adapter_folder: Path, target: Path, spec: MergeSpec) -> None:
    """Make the folder `target`, whole or not at all; what a killed try left beside it is used. Raises: see above."""
    partial, beside = target.with_name(f"{target.name}.partial"), target.with_name("peft")
    partial.mkdir(parents=True, exist_ok=True)
    files.remove_strays(partial.parent)  # a kill inside a shard leaves up to 10 GB
    config = files.read_json(base_folder / "config.json")
    if stored := config.get("quantization_config"):
        require_mxfp4(stored)
    with Reader.opened(base_folder) as base, Reader.opened(adapter_folder) as deltas:
        plan = plan_merge(
            base.headers,
            deltas.headers,
            files.read_json(adapter_folder / "adapter_config.json"),
            dtype=_DTYPES[spec.dtype],
            experts=spec.experts,
            shard_bytes=spec.shard_bytes,
        )
        written = sum(files.list_files(partial).values())
        files.require_disk(partial, plan.total_bytes - written + (64 << 20), "merging")
        with _disk_errors(partial), PeftSide.started(adapter_folder, base_folder, beside) as peft:
            ledger = write_model(plan, base, deltas, partial)
            write_side_files(base_folder, config, partial, spec)
            with Reader.opened(partial) as merged:
                ledger["peft"] = peft.check(plan, base, deltas, merged)
            files.write_json(partial / LEDGER, ledger)
    shutil.rmtree(beside)
    partial.rename(target)
    files.fsync_folder(target.parent)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Say a full disk as what it is: room was looked at before, but others write too."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise CapacityError(
            f"the disk filled while merging below {folder} ({error.strerror}; {files.free_bytes(folder) / 1e9:.1f} GB "
            "are free): free some space and run it again, finished shards are kept"
        ) from error


def require_same_base(adapter: TrainedAdapter, store: ArtifactStore) -> None:
    """Raise unless the base is still the one that the adapter was trained on.

    Sizes and times tell in microseconds; when they moved, the files are digested.
    Raises: MissingError when the base is gone, CorruptError when its bytes changed.
    """
    base, folder = store.ancestor(adapter, BaseCheckpoint), Path(adapter.base_folder)  # a remote brings it
    if not folder.is_dir():
        raise MissingError(
            f"the base of adapter {adapter.short} was at {folder} and is gone: bring it back, or train again"
        )
    about = (store.manifest(type(base), base.key) or {}).get("about", {})
    if base.model_digest == adapter.base_digest and about.get("stamp") == files.stamp(folder):
        return
    if folder_digest(digest_files(folder)) != adapter.base_digest:
        raise CorruptError(
            f"the base at {folder} is not the one that adapter {adapter.short} was trained on (its files "
            f"changed since): bring the old files back, or remove {adapter.kind}/{adapter.key[:16]} here and in the "
            "remote storage and train on the new ones"
        )


def _side_digests(folder: Path, shards: dict[str, str]) -> dict[str, str]:
    return {name: files.digest(folder / name) for name in files.list_files(folder) if name not in shards}


def write_model(plan: MergePlan, base: Reader, deltas: Reader, folder: Path) -> dict[str, Any]:  # Any: JSON values
    """Write every shard and the index; shards that an earlier try finished are kept.

    Returns the ledger: {"shards": file -> sha256, "changes": [a row per changed parameter], "adapter": [a row per
        adapter tensor], "requantized": [a row per parameter made MXFP4 again], "num_tensors", "total_bytes"}.
    Raises: ShapeError when a tensor of the adapter was not used.
    """
    names = shard_names(len(plan.shards))
    ledger: dict[str, Any] = {"num_tensors": len(plan.outputs), "total_bytes": plan.total_bytes, "shards": {}}
    rows: dict[str, list[Any]] = {"changes": [], "adapter": [], "requantized": []}
    for name, done in zip(names, _write_shards(plan, base, deltas, folder, names), strict=True):
        ledger["shards"][name] = done["sha256"]
        for kind, found in rows.items():
            found.extend(done[kind])
    if unused := deltas.headers.keys() - {row["tensor"] for row in rows["adapter"]}:
        raise ShapeError(f"adapter tensors that were not merged: {', '.join(sorted(unused))}")
    if len(names) > 1:
        shards = zip(names, plan.shards, strict=True)
        weight_map = {stored.name: name for name, outputs in shards for o in outputs for stored in o.stored}
        files.write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map},
        )
    return {**ledger, **rows}


def _write_shards(
    plan: MergePlan, base: Reader, deltas: Reader, folder: Path, names: list[str]
) -> list[dict[str, Any]]:  # Any: JSON values
    """Write the shards, a few at a time (one sha256 runs at 1.3 GB/s), and return their records in order."""
    num_cores = len(os.sched_getaffinity(0))
    past_cache = goes_past_cache(plan.total_bytes, base.place(next(iter(base.headers)))[0], folder)

    def make(name: str, outputs: tuple[Output, ...], pool: Executor) -> dict[str, Any]:  # Any: as above
        record = folder.parent / f"{name}.ledger.json"  # beside the shard, renamed first: a shard without it is redone
        size = (folder / name).stat().st_size if (folder / name).exists() else -1
        if not (record.exists() and files.read_json(record)["bytes"] == size):
            write_shard(outputs, base, deltas, folder / name, record, pool=pool, past_cache=past_cache)
        logger.info("merged shard %s of %d, %.2f GB", name, len(names), (folder / name).stat().st_size / 1e9)
        return files.read_json(record)

    at_once = max(1, min(_MOST_SHARDS, num_cores // 2))
    with makers(max(2, min(_MOST_MAKERS, num_cores))) as pool, ThreadPoolExecutor(at_once) as shards:
        futures = [shards.submit(make, name, part, pool) for name, part in zip(names, plan.shards, strict=True)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            shards.shutdown(cancel_futures=True)  # those that have begun end: a resume needs them not again
            raise


def write_side_files(base_folder: Path, config: dict[str, Any], folder: Path, spec: MergeSpec) -> None:
    """Copy tokenizer, template and generation config; write the config without a stale quantisation."""
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and path.suffix in _SIDE_FILES and path.name not in _NOT_COPIED:
            with files.aside(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    stale = {"quantization_config", "torch_dtype", "_name_or_path"}
    kept = {name: value for name, value in config.items() if name not in stale} | {"dtype": spec.dtype}
    if spec.experts == "mxfp4":
        kept["quantization_config"] = QUANTIZATION_CONFIG
    files.write_json(folder / "config.json", kept)
