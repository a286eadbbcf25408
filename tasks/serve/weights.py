"""Whether the files that vLLM is given are those that were made: byte for byte, before anything is started.

    PublishedModel -> require_merged_files()      raises, naming the first file that differs

A file counts as read while its size, its times and its place on the disk are what they were when it was
digested: 40 GB are hashed once, not at each start. The time of the last change of its inode (ctime) is among
them, which no program can set back.

Ring: edge (disk).
"""

import logging
import time
from hashlib import sha256
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel, TrainedModel, folder_digest
from tasks.errors import CorruptError, MissingError
from tasks.hub import hub_errors
from tasks.serve.settings import BESIDE_MODEL

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".jinja", ".model", ".tiktoken")
_READ = ("config.json", "generation_config.json", "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab")
logger = logging.getLogger(__name__)


def locate_model(published: PublishedModel, hub: HfApi) -> PublishedModel:
    """Return the published model with a folder that is there: what was sent, else the commit as the Hub has it.

    Raises: MissingError when a local publication is gone, the Hub's errors when its commit can't be had.
    """
    folder = Path(published.model_folder)
    if (folder / "config.json").is_file():
        return published
    if published.place != "hub":
        raise MissingError(f"the published model {published.repo_id} is not at {folder} any more: run its flow again")
    doing = f"fetching {published.repo_id}@{published.commit[:8]}"
    with hub_errors(doing):
        found = snapshot_download(
            published.repo_id, revision=published.commit, token=hub.token, endpoint=hub.endpoint
        )  # fmt: skip
    logger.info("%s is gone: serving the commit %s from %s", folder, published.commit[:8], found)
    return published.model_copy(update={"model_folder": found})


def require_merged_files(published: PublishedModel, store: ArtifactStore) -> None:
    """Raise CorruptError unless the published folder holds the merged files, and nothing else that a server loads.

    Args:
        published: its folder is what vLLM will be given.
        store: where the merged model's manifest says what each file's digest was, and where digests are kept.
    Cost: one read of each file that changed since the last look; microseconds without.
    """
    folder = Path(published.model_folder)
    expected = _made_digests(published, store)
    for path in filter(Path.exists, files.weight_files(folder)):  # a truncated shard is found in microseconds
        files.read_safetensors_header(path)
    found = _digest_known(folder, store)
    if not expected:
        _compare_whole(published, found, store)
        return
    made = _made(published, store)
    kind = made.kind if made else ""
    for name, digest in expected.items():
        if found.get(name) != digest:
            what = f"has sha256 {found[name][:16]}..., {kind} was {digest[:16]}..." if name in found else "is missing"
            raise CorruptError(
                f"{folder / name} is not the {kind} file: it {what}; nothing was started. Publish the {kind} model "
                f"again (it is at {made.model_folder if made else 'nowhere any more'})"
            )
    added = [name for name in found if name not in expected and _is_loaded(name)]
    if added:
        raise CorruptError(
            f"{folder} holds {', '.join(added)}, which the {kind} model has not and a server would load; nothing was "
            "started. Remove it, or publish again"
        )


def _compare_whole(published: PublishedModel, found: dict[str, str], store: ArtifactStore) -> None:
    """Without a digest of each file (its artifact was cleared away) only that over all files is known."""
    sent = {name: digest for name, digest in found.items() if name not in BESIDE_MODEL and "/" not in name}
    if folder_digest(sent) != published.model_digest:
        made = _made(published, store)
        why = f"{made.ref} tells no digest of each file" if made else "The artifact that it was published from is gone"
        raise CorruptError(
            f"the files of {published.model_folder} have the digest {folder_digest(sent)[:16]}..., the published model "
            f"{published.model_digest[:16]}...; nothing was started. {why}, so which file differs is not "
            "known: make and publish it again"
        )


def _made(published: PublishedModel, store: ArtifactStore) -> MergedModel | TrainedModel | None:
    """Return the model that was published: merged, or trained here as a whole; the nearest, so never one's base."""
    for cls in (MergedModel, TrainedModel):
        try:
            return store.ancestor(published, cls)
        except MissingError:
            continue
    return None


def _made_digests(published: PublishedModel, store: ArtifactStore) -> dict[str, str]:
    made = _made(published, store)
    about = (store.manifest(type(made), made.key) or {}).get("about", {}) if made else {}
    digests = about.get("digests", {})
    if digests and folder_digest(digests) != published.model_digest:
        raise CorruptError(
            f"{published.ref} says model digest {published.model_digest[:16]}..., its {made.kind if made else ''} "
            f"parent {folder_digest(digests)[:16]}...: one of the two manifests was edited; make and publish it again"
        )
    return digests


def _is_loaded(name: str) -> bool:
    """Say whether a server reads a file of this name: not below a folder, where publish puts an adapter."""
    if "/" in name:
        return False
    return name.endswith(_LOADED) or (name.endswith((".json", ".txt")) and name.startswith(_READ))


def _digest_known(folder: Path, store: ArtifactStore) -> dict[str, str]:
    """Return file -> sha256; what has the same inode, size and times as when it was read is not read again."""
    memory = store.root / "reference" / f"files-{sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    with files.lock_file(memory.with_suffix(".lock"), f"the digests of {folder}"):
        try:
            known: dict[str, list[str]] = files.read_json(memory)
        except (OSError, CorruptError):
            known = {}
        began, num_bytes, now = time.monotonic(), 0, dict[str, list[str]]()
        for name, size in files.list_files(folder).items():
            mark = _mark(folder / name)
            before = known.get(name, ["", ""])
            if before[0] == mark:
                now[name] = before
            else:
                now[name], num_bytes = [mark, files.digest(folder / name)], num_bytes + size
        if now != known:
            files.write_json(memory, now)
            logger.info("digested %.2f GB in %.1f s", num_bytes / 1e9, time.monotonic() - began)
    return {name: digest for name, (_, digest) in now.items()}


def _mark(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
