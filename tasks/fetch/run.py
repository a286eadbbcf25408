"""Fetch a pinned data set into parquet rows, and a pinned base model into a folder.

    FetchSpec -> pin (commit or file digest) -> rows -> train.parquet, validation.parquet, rejected.jsonl

Ring: edge.
"""

import csv
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, digest_files, folder_digest, make_key
from tasks.errors import CorruptError, DataError, MissingError, SpecError, TransientError
from tasks.fetch.rows import RejectedRowError, is_validation_row, read_row
from tasks.hub import hub_errors, pin_commit
from tasks.specs import BaseModelSpec, FetchSpec

VERSION = 1
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "ja_culture"
_SUFFIXES = (".jsonl", ".csv", ".parquet")
_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*"]
_BASE_COPIES = ["original/*", "metal/*"]  # gpt-oss ships its weights three times
logger = logging.getLogger(__name__)
Row = dict[str, Any]  # Any: whatever the source holds


def fetch_dataset(spec: FetchSpec, store: ArtifactStore, hub: HfApi) -> FetchedDataset:
    """Fetch the data set that `spec` names; a second call returns the finished one.

    Raises: MissingError (no such file, repo, split), DataError (empty, bad rows), AccessError.
    """
    pins = pin_dataset(spec, hub)
    key = make_key("fetch", VERSION, spec, pins)
    with store.claim(FetchedDataset, key) as claim:
        if claim.found:
            return claim.found
        train, validation, rejected = read_dataset(spec, hub, pins)
        for name, rows in (("train", train), ("validation", validation)):
            with files.aside(claim.folder / f"{name}.parquet") as path:
                pq.write_table(pa.Table.from_pylist(rows), path)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        files.write_text(claim.folder / "rejected.jsonl", "".join(lines))
        artifact = FetchedDataset(
            key=key,
            folder=str(claim.folder),
            source=spec.source,
            revision=next(iter(pins.values())),
            is_chat=not spec.text_column,
            num_train_rows=len(train),
            num_validation_rows=len(validation),
            num_rejected_rows=len(rejected),
        )
        return claim.commit(artifact, spec=spec, about={"pins": pins})


def pin_dataset(spec: FetchSpec, hub: HfApi) -> dict[str, str]:
    """Return what the source's name means right now: digests of files, or the commit of a Hub data set."""
    if spec.source == "shipped":
        paths = {"source": SHIPPED / "train.jsonl", "validation_source": SHIPPED / "validation.jsonl"}
    elif _is_file_name(spec.source):
        named = {"source": spec.source, "validation_source": spec.validation_source}
        paths = {name: Path(path).expanduser() for name, path in named.items() if path}
    else:
        return {"commit": pin_commit(hub, spec.source, spec.revision, "dataset")}
    return {name: files.digest(_existing(path)) for name, path in paths.items()}


def read_dataset(spec: FetchSpec, hub: HfApi, pins: dict[str, str]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return (train, validation, rejected) rows. Raises DataError when they can't be learnt from."""
    train, validation, rejected = _split(spec, hub, pins)
    _refuse_bad(spec, train, validation, rejected)
    return train, validation, rejected


def _is_file_name(source: str) -> bool:
    return source.endswith(_SUFFIXES) or Path(source).expanduser().is_file()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MissingError(f"data file {path} is not there (working directory {Path.cwd()}): check FetchSpec.source")
    return path


def _split(spec: FetchSpec, hub: HfApi, pins: dict[str, str]) -> tuple[list[Row], list[Row], list[Row]]:
    if spec.source == "shipped":
        sources = [_read_file(SHIPPED / "train.jsonl"), _read_file(SHIPPED / "validation.jsonl")]
    elif "commit" in pins:
        splits = [spec.split, *([spec.validation_split] if spec.validation_split else [])]
        sources = [_read_hub(spec, split, pins["commit"], hub) for split in splits]
    else:
        names = [spec.source, *([spec.validation_source] if spec.validation_source else [])]
        sources = [_read_file(Path(name).expanduser()) for name in names]
    rejected: list[Row] = []
    train = list(_accept(sources[0], spec, rejected, "train"))
    if len(sources) == 2:
        return train, list(_accept(sources[1], spec, rejected, "validation")), rejected
    chosen = [is_validation_row(_content(row), spec.validation_pct) for row in train]
    return (
        [row for row, held_out in zip(train, chosen, strict=True) if not held_out],
        [row for row, held_out in zip(train, chosen, strict=True) if held_out],
        rejected,
    )


def _content(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "row_id"}


def _accept(rows: Iterable[tuple[str, Row]], spec: FetchSpec, rejected: list[Row], split: str) -> Iterator[Row]:
    for count, (where, row) in enumerate(rows):
        if spec.max_rows and count >= spec.max_rows:
            return
        try:
            yield {"row_id": where, **read_row(row, spec)}
        except RejectedRowError as error:
            rejected.append({"split": split, "row_id": where, "reason": str(error)})


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a JSONL, CSV or parquet file; `where` is the line (parquet: row) that a person looks up."""
    read = {".parquet": _read_parquet, ".csv": _read_csv}.get(path.suffix, _read_jsonl)
    try:
        yield from ((f"{path.name}:{number}", row) for number, row in read(path))
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 ({error}): convert it, or delete those bytes") from error
    except csv.Error as error:
        raise CorruptError(f"{path} is no CSV ({error}): mend it, or save it as JSONL") from error
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path} is no whole parquet file ({error}): download or make it again") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    rows = (row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    yield from enumerate(rows, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        for row in reader:
            yield reader.line_num, dict(row)  # the last line of the row: a quoted field may hold line ends


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorruptError(f"{path}:{number} is not JSON ({error.msg}): mend or delete that line") from error
            yield number, row if isinstance(row, dict) else {"value": row}


def _read_hub(spec: FetchSpec, split: str, commit: str, hub: HfApi) -> Iterator[tuple[str, Row]]:
    from datasets import config, load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    doing = f"data set {spec.source}@{commit[:8]} split {split!r}"
    if config.HF_ENDPOINT.rstrip("/") != hub.endpoint:  # datasets reads it at import: the token would go elsewhere
        raise SpecError(f"{doing}: the Hub Account's endpoint is {hub.endpoint}; set HF_ENDPOINT to it as well")
    with hub_errors(doing):
        try:
            builder = load_dataset_builder(spec.source, spec.config or None, revision=commit, token=hub.token)
            if builder.hash != commit:  # when the Hub fails, datasets falls back to whatever revision it has cached
                raise TransientError(f"{doing}: the Hub failed, and the cache holds {builder.hash} instead")
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        except DatasetNotFoundError as error:
            raise MissingError(f"{doing}: not found; check FetchSpec.source and HF_TOKEN") from error
        except ValueError as error:  # an unknown split or configuration; the message lists what exists
            raise DataError(f"{doing}: {error}") from error
    yield from ((f"{split}:{index}", dict(row)) for index, row in enumerate(rows))


def _refuse_bad(spec: FetchSpec, train: list[Row], validation: list[Row], rejected: list[Row]) -> None:
    total = len(train) + len(validation) + len(rejected)
    if total == 0:
        raise DataError(f"data set {spec.source} is empty: expected at least one row")
    if 100 * len(rejected) / total > spec.max_rejected_pct:
        shown = "; ".join(f"{row['row_id']}: {row['reason']}" for row in rejected[:3])
        raise DataError(
            f"data set {spec.source}: {len(rejected)} of {total} rows can't be used ({shown}): mend them, or raise "
            f"FetchSpec.max_rejected_pct (now {spec.max_rejected_pct:g}) to leave them out"
        )
    if not train or not validation:
        side = "train" if not train else "validation"
        raise DataError(
            f"data set {spec.source} has no {side} rows ({total} in all): add rows, name "
            "FetchSpec.validation_source or validation_split, or change validation_pct"
        )


def fetch_base(spec: BaseModelSpec, store: ArtifactStore, hub: HfApi) -> BaseCheckpoint:
    """Bring the base model to this machine: a local folder as it is, a Hub model as a pinned snapshot.

    Raises: MissingError (no such folder or repo), AccessError, CapacityError (disk).
    """
    local = local_folder(spec)
    pins = (
        files.stamp(check_model_folder(local))
        if local
        else {"commit": pin_commit(hub, spec.model, spec.revision, "model")}
    )
    key = make_key("fetch-base", VERSION, spec, pins)
    with store.claim(BaseCheckpoint, key) as claim:
        if claim.found and Path(claim.found.model_folder).is_dir():
            return claim.found
        model_folder = local or check_model_folder(_download(spec.model, pins["commit"], claim.folder, hub))
        digests = digest_files(model_folder)
        artifact = BaseCheckpoint(
            key=key,
            folder=str(claim.folder),
            model_folder=str(model_folder),
            origin=str(local) if local else f"{spec.model}@{pins['commit']}",
            model_digest=folder_digest(digests),
            num_parameters=count_parameters(model_folder),
        )
        return claim.commit(artifact, spec=spec, about={"digests": digests, "stamp": files.stamp(model_folder)})


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
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(files.read_json(index)["weight_map"].values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise MissingError(f"base model {folder} lacks {missing[0]} that its index names: download it again")
        shards = [folder / name for name in named]
    if not shards:
        raise MissingError(f"base model {folder} has no .safetensors weights: convert it or download it again")
    for shard in shards:
        files.read_safetensors_header(shard)
    return folder


def count_parameters(folder: Path) -> int:
    """Return the number of stored elements of a model folder, from its headers (packed 4-bit blocks count once)."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        for entry in files.read_safetensors_header(shard)[0].values():
            size = 1
            for length in entry["shape"]:
                size *= length
            total += size
    return total


def download_bytes(repo_id: str, commit: str, hub: HfApi) -> int:
    """Return the size of what `fetch_base` downloads of a Hub model."""
    with hub_errors(f"base model {repo_id}@{commit[:8]}"):
        info = hub.model_info(repo_id, revision=commit, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    wanted = filter_repo_objects(sizes, allow_patterns=_BASE_FILES, ignore_patterns=_BASE_COPIES)
    return sum(sizes[name] for name in wanted)


def _download(repo_id: str, commit: str, folder: Path, hub: HfApi) -> Path:
    """Download a snapshot; an interrupted one goes on where it was."""
    files.require_disk(folder, download_bytes(repo_id, commit, hub), f"downloading {repo_id}")
    target = folder / "model"
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
