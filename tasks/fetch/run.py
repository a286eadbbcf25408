"""Fetch a pinned data set into parquet rows, and a pinned base model into a folder.

    FetchSpec -> sources.py -> rows -> train.parquet, validation.parquet, rejected.jsonl
    BaseModelSpec -> a local folder as it is | the snapshot of a Hub commit

Ring: edge.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, folder_digest, make_key
from tasks.errors import DataError, MissingError
from tasks.fetch.report import Statistics
from tasks.fetch.rows import Read, Row
from tasks.fetch.sources import pin_dataset, read_rows, require_unchanged
from tasks.gptoss.layout import quantized_stem
from tasks.hub import hub_errors, pin_commit
from tasks.specs import BaseModelSpec, FetchSpec

VERSION = 1
_BATCH_ROWS = 1000
_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*"]
_BASE_COPIES = ["original/*", "metal/*", "consolidated*"]  # the same weights again, in other layouts
logger = logging.getLogger(__name__)


def fetch_dataset(spec: FetchSpec, store: ArtifactStore, hub: HfApi) -> FetchedDataset:
    """Fetch the data set that `spec` names; a second call returns the finished one.

    Raises: MissingError (no such file, repo, split), SpecError (no such kind of source), DataError (empty, bad
        rows), AccessError, TransientError (Hub away, file edited meanwhile).
    """
    pins = pin_dataset(spec, hub)
    key = make_key("fetch", VERSION, spec, pins)
    with store.claim(FetchedDataset, key) as claim:
        if claim.found:
            return claim.found
        found = Statistics()
        with _writing(claim.folder, is_chat=not spec.text_column) as write:
            for read in read_rows(spec, hub, pins):
                found.add(read)
                write(read)
            require_unchanged(spec, hub, pins)
            _refuse_bad(spec, found)
        artifact = FetchedDataset(
            key=key,
            folder=str(claim.folder),
            source=spec.source,
            revision=next(iter(pins.values())),
            is_chat=not spec.text_column,
            num_train_rows=found.num_rows["train"],
            num_validation_rows=found.num_rows["validation"],
            num_rejected_rows=found.num_rejected,
        )
        logger.info("fetched %d rows of %s, %d rejected", found.total, spec.source, found.num_rejected)
        return claim.commit(artifact, spec=spec, about={"pins": pins, "statistics": found.values()})


def survey_dataset(spec: FetchSpec, hub: HfApi) -> str:
    """Say what a fetch will find: of a Hub data set its commit, of files every row, of which only counts are kept.

    Raises: what fetch_dataset raises of a file's rows.
    """
    pins = pin_dataset(spec, hub)
    said = f"{spec.source} at {next(iter(pins.values()))[:12]}"
    if "commit" in pins:
        return said
    found = Statistics()
    for read in read_rows(spec, hub, pins):
        found.add(read)
    _refuse_bad(spec, found)
    return f"{said}, {found.num_rows['train']} train and {found.num_rows['validation']} validation rows"


@contextmanager
def _writing(folder: Path, *, is_chat: bool) -> Iterator[Callable[[Read], None]]:
    """Yield a function that writes a row to its file; the files appear when the body ends without an error."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    content = ("messages", pa.list_(message)) if is_chat else ("text", pa.string())
    schema = pa.schema([("row_id", pa.string()), content])
    waiting: dict[str, list[Row]] = {"train": [], "validation": []}
    with ExitStack() as stack:
        aside = {split: stack.enter_context(files.aside(folder / f"{split}.parquet")) for split in waiting}
        rejected = stack.enter_context(files.aside(folder / "rejected.jsonl")).open("w", encoding="utf-8")
        stack.enter_context(rejected)
        tables = {split: stack.enter_context(pq.ParquetWriter(path, schema)) for split, path in aside.items()}

        def flush(split: str) -> None:
            if waiting[split]:
                tables[split].write_table(pa.Table.from_pylist(waiting[split], schema=schema))
                waiting[split].clear()

        def write(read: Read) -> None:
            if read.reason:
                line = {"split": read.split, "row_id": read.row_id, "reason": read.reason}
                rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                return
            waiting[read.split].append({"row_id": read.row_id, **read.row})
            if len(waiting[read.split]) >= _BATCH_ROWS:
                flush(read.split)

        yield write
        for split in waiting:
            flush(split)


def _refuse_bad(spec: FetchSpec, found: Statistics) -> None:
    if found.total == 0:
        raise DataError(f"data set {spec.source} is empty: expected at least one row")
    if 100 * found.num_rejected / found.total > spec.max_rejected_pct:
        shown = "; ".join(f"{read.row_id}: {read.reason}" for read in found.first_rejected)
        raise DataError(
            f"data set {spec.source}: {found.num_rejected} of {found.total} rows can't be used ({shown}): mend them, "
            f"or raise FetchSpec.max_rejected_pct (now {spec.max_rejected_pct:g}) to leave them out"
        )
    lacking = [side for side in ("train", "validation") if not found.num_rows[side]]
    if lacking:
        raise DataError(
            f"data set {spec.source} has no {lacking[0]} rows ({found.total} in all): add rows, name "
            "FetchSpec.validation_source or validation_split, or change validation_pct"
        )


def pin_base(spec: BaseModelSpec, hub: HfApi) -> dict[str, str]:
    """Return what the base's name means right now: a commit of the Hub, or sizes and times of a folder's files."""
    if local := local_folder(spec):
        return files.stamp(check_model_folder(local))
    return {"commit": pin_commit(hub, spec.model, spec.revision, "model")}


def base_key(spec: BaseModelSpec, pins: dict[str, str]) -> str:
    """Return the key of the base that was pinned."""
    return make_key("fetch-base", VERSION, spec, pins)


def fetch_base(spec: BaseModelSpec, store: ArtifactStore, hub: HfApi) -> BaseCheckpoint:
    """Bring the base model to this machine: a local folder as it is, a Hub model as a pinned snapshot.

    Raises: MissingError (no such folder or repo), AccessError, CapacityError (disk).
    """
    local, pins = local_folder(spec), pin_base(spec, hub)
    key = base_key(spec, pins)
    with store.claim(BaseCheckpoint, key) as claim:
        if claim.found and _is_whole(claim.found, store):
            return claim.found
        model_folder = local or check_model_folder(
            _download(spec.model, pins["commit"], download_folder(key, store), hub)
        )
        digests = _digest_model(model_folder)
        artifact = BaseCheckpoint(
            key=key,
            folder=str(claim.folder),
            model_folder=str(model_folder),
            origin=str(local) if local else f"{spec.model}@{pins['commit']}",
            model_digest=folder_digest(digests),
            num_parameters=count_parameters(model_folder),
        )
        sizes = {name: (model_folder / name).stat().st_size for name in digests}
        about = {"digests": digests, "sizes": sizes, "stamp": files.stamp(model_folder)}
        return claim.commit(artifact, spec=spec, about=about)


def _is_whole(base: BaseCheckpoint, store: ArtifactStore) -> bool:
    """Say whether each file of a base is where its manifest says: it may have been on a disk that is gone."""
    folder, about = Path(base.model_folder), (store.manifest(BaseCheckpoint, base.key) or {}).get("about", {})
    present = files.list_files(folder)
    return folder.is_dir() and all(present.get(name) == size for name, size in about.get("sizes", {}).items())


def download_folder(key: str, store: ArtifactStore) -> Path:
    """Return where a Hub base is downloaded to: its artifact's folder, or below TATARA_MODELS.

    The second is for a TATARA_HOME on a small or slow disk (Google Drive): what was trained stays there, 15 GB that can
    be downloaded again do not.
    """
    if elsewhere := os.environ.get("TATARA_MODELS"):
        return Path(elsewhere).expanduser().resolve() / key[:16]
    return store.folder(BaseCheckpoint, key) / "model"


def local_folder(spec: BaseModelSpec) -> Path | None:
    """Return the folder that a base is named by, None when it is a Hub id."""
    folder = Path(spec.model).expanduser()
    if folder.is_dir() or spec.model.startswith((".", "/", "~")):
        return folder.resolve()
    return None


def check_model_folder(folder: Path) -> Path:
    """Return `folder` when it holds a whole model. Raises MissingError or CorruptError naming what lacks."""
    if not (folder / "config.json").is_file():
        raise MissingError(f"base model {folder} has no config.json: name a Hub id or a transformers model folder")
    shards = files.weight_files(folder)
    if not shards:
        raise MissingError(f"base model {folder} has no .safetensors weights: convert it or download it again")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise MissingError(f"base model {folder} lacks {missing[0]} that its index names: download it again")
    for shard in shards:
        files.read_safetensors_header(shard)
    return folder


def _digest_model(folder: Path) -> dict[str, str]:
    """Return the digests of a model's files; weights that it holds a second time, in another layout, don't count."""
    shards = set(files.weight_files(folder))
    names = [name for name in files.list_files(folder) if folder / name in shards or not name.endswith(".safetensors")]
    return {name: files.digest(folder / name) for name in names}


def count_parameters(folder: Path) -> int:
    """Return the number of parameters of a model folder, from its headers.

    A byte of an MXFP4 block holds two of them; the scales beside it are none.
    """
    total = 0
    for shard in files.weight_files(folder):
        for name, entry in files.read_safetensors_header(shard)[0].items():
            found = quantized_stem(name)
            held = {"blocks": 2, "scales": 0}[found[1]] if found else 1
            total += held * prod(entry["shape"])
    return total


def download_bytes(repo_id: str, commit: str, hub: HfApi) -> int:
    """Return the size of what `fetch_base` downloads of a Hub model."""
    with hub_errors(f"base model {repo_id}@{commit[:8]}"):
        info = hub.model_info(repo_id, revision=commit, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    wanted = filter_repo_objects(sizes, allow_patterns=_BASE_FILES, ignore_patterns=_BASE_COPIES)
    return sum(sizes[name] for name in wanted)


def downloaded_bytes(spec: BaseModelSpec, commit: str, store: ArtifactStore) -> int:
    """Return the disk that an interrupted download of a Hub model takes already; it goes on from there."""
    key = base_key(spec, {"commit": commit})
    return sum(files.list_files(download_folder(key, store)).values())


def _download(repo_id: str, commit: str, target: Path, hub: HfApi) -> Path:
    """Download a snapshot; an interrupted one goes on where it was."""
    here = sum(files.list_files(target).values())
    files.require_disk(target, max(0, download_bytes(repo_id, commit, hub) - here), f"downloading {repo_id}")
    with hub_errors(f"base model {repo_id}@{commit[:8]}"):
        hub.snapshot_download(  # the client's own: it keeps its endpoint and token
            repo_id,
            revision=commit,
            local_dir=target,
            allow_patterns=_BASE_FILES,
            ignore_patterns=_BASE_COPIES,
        )
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the client's notes hold times: no part of the digest
    return target
