"""Upload a merged model and read its checksums back; without a repo, keep it local in Hub layout.

    MergedModel + card -> staging (hard links) -> Hub commit  | <root>/hub/models--owner--name/snapshots/<commit>

Ring: edge.
"""

import logging
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils._verification import FolderVerification

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    FetchedDataset,
    MergedModel,
    PackedDataset,
    PublishedModel,
    TrainedAdapter,
    make_key,
)
from tasks.errors import CorruptError
from tasks.hub import find_model, find_repo, hub_errors, refuse_public, require_target
from tasks.publish.card import Lineage, model_card
from tasks.specs import PublishSpec

VERSION = 1
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
LOCAL_REPO = "local/{name}"
logger = logging.getLogger(__name__)


def publish_model(merged: MergedModel, spec: PublishSpec, store: ArtifactStore, hub: HfApi) -> PublishedModel:
    """Publish to the Hub when a repo and a token are given, else to a local folder in Hub layout.

    A second call finds the finished one and uploads nothing, unless the Hub holds something else by now.
    Raises: AccessError (401, 403, a public repo where a private one was asked for), TransientError,
        CorruptError when what arrived differs from what was sent.
    """
    wanted = find_repo(spec)
    place = "hub" if wanted and hub.token else "local"
    repo_id = wanted or LOCAL_REPO.format(name=f"tatara-{merged.short}")
    pins = {"place": place, "repo_id": repo_id, "digest": merged.model_digest}
    key = make_key("publish", VERSION, spec, pins, (merged,))
    with store.claim(PublishedModel, key) as claim:
        if claim.found and _is_still_there(claim.found, spec, hub):
            return claim.found
        staging = _stage(merged, claim.folder / "model", model_card(lineage_of(merged, store)))
        if place == "hub":
            commit, url = upload(hub, repo_id, staging, spec)
            model_folder = staging
        else:
            commit, model_folder = store_locally(staging, store.root / "hub", repo_id, merged.model_digest)
            url = model_folder.as_uri()
            lacking = f"the repo {wanted} but no token" if wanted else f"no repo{'' if hub.token else ' and token'}"
            logger.info("%s given: published locally at %s", lacking, model_folder)
        artifact = PublishedModel(
            key=key,
            folder=str(claim.folder),
            parents=(merged.ref,),
            place=place,
            repo_id=repo_id,
            commit=commit,
            url=url,
            model_folder=str(model_folder),
            model_digest=merged.model_digest,
        )
        return claim.commit(artifact, spec=spec)


def lineage_of(merged: MergedModel, store: ArtifactStore) -> Lineage:
    """Collect the artifacts behind a merged model."""
    adapter = store.ancestor(merged, TrainedAdapter)
    manifest = store.manifest(TrainedAdapter, adapter.key)
    return Lineage(
        base=store.ancestor(merged, BaseCheckpoint),
        dataset=store.ancestor(merged, FetchedDataset),
        packed=store.ancestor(merged, PackedDataset),
        adapter=adapter,
        merged=merged,
        train_spec=(manifest or {})["spec"],
    )


def _stage(merged: MergedModel, folder: Path, card: str) -> Path:
    """Gather what is published: hard links of the merged files, and the card. Costs no disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in files.list_files(Path(merged.model_folder)):
        _link(Path(merged.model_folder) / name, folder / name)
    files.write_text(folder / "README.md", card)
    return folder


def _is_still_there(found: PublishedModel, spec: PublishSpec, hub: HfApi) -> bool:
    """Neither the Hub nor a local snapshot lies in the artifact's folder: its manifest does not watch over them."""
    if found.place == "local":
        return files.list_files(Path(found.model_folder)) == files.list_files(found.path / "model")
    info = find_model(hub, found.repo_id, f"looking for {found.repo_id}@{spec.revision}", spec.revision)
    is_there = info is not None and info.sha == found.commit and (bool(info.private) or not spec.private)
    if not is_there:
        logger.info("%s@%s is not at commit %s any more", found.repo_id, spec.revision, found.commit[:8])
    return is_there


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        with files.aside(target) as temporary:
            shutil.copyfile(source, temporary)


def upload(hub: HfApi, repo_id: str, folder: Path, spec: PublishSpec) -> tuple[str, str]:
    """Upload `folder` and compare checksums on the commit. Returns (commit, URL)."""
    doing = f"publishing to {repo_id}"
    require_target(hub, repo_id, doing, private=spec.private)
    with hub_errors(doing):
        hub.create_repo(repo_id, private=spec.private, exist_ok=True)
        refuse_public(hub.model_info(repo_id), doing, private=spec.private)  # exist_ok leaves a public repo public
        if spec.revision != "main":
            hub.create_branch(repo_id, branch=spec.revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=spec.revision,
            ignore_patterns=list(spec.ignore_patterns),
            delete_patterns=_WEIGHTS,  # an older model's shards beside the new ones would be loaded
            commit_message="Publish a merged model with Tatara",
        )
        found = hub.verify_repo_checksums(repo_id, revision=commit.oid, local_dir=folder)
    _refuse_difference(f"{doing}: commit {commit.oid[:8]}", found, spec)
    return commit.oid, f"{hub.endpoint}/{repo_id}/tree/{commit.oid}"


def _refuse_difference(doing: str, found: FolderVerification, spec: PublishSpec) -> None:
    """Raise CorruptError when the commit lacks, changes or adds to the weights that were sent.

    `extra_paths` are here but not there (a .gitignore on the Hub dropped them); `missing_paths` are there
    but not here: .gitattributes, which the Hub makes itself, or a person's own files.
    """
    dropped = list(filter_repo_objects(found.extra_paths, ignore_patterns=list(spec.ignore_patterns)))
    stale = list(filter_repo_objects(found.missing_paths, allow_patterns=_WEIGHTS))
    changed = [mismatch["path"] for mismatch in found.mismatches]
    if changed or dropped or stale:
        raise CorruptError(
            f"{doing} differs from what was sent: changed {changed}, not stored {dropped}, not ours {stale}; "
            "run it again, and look for a .gitignore in the repo"
        )


def store_locally(staging: Path, cache: Path, repo_id: str, digest: str) -> tuple[str, Path]:
    """Lay `staging` out as the Hub's cache does, so that HF_HUB_CACHE=<cache> finds `repo_id` offline."""
    commit = digest[:40]
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    partial = repo / "snapshots" / f".{commit}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name in files.list_files(staging):
        _link(staging / name, partial / name)
    shutil.rmtree(snapshot, ignore_errors=True)
    partial.rename(snapshot)
    files.write_text(repo / "refs" / "main", commit)
    return commit, snapshot
