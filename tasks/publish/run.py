"""Publish a model, an adapter or both: to the Hub, or without a repo and a token to a local folder.

    MergedModel | TrainedAdapter | TrainedModel -> staging (hard links) + card -> Hub commit
                                          or <root>/hub/models--owner--name/snapshots/<commit>

Ring: edge.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import (
    ArtifactStore,
    MergedModel,
    PublishedModel,
    TrainedAdapter,
    TrainedModel,
    folder_digest,
    make_key,
)
from tasks.errors import SpecError
from tasks.hub import find_model, find_repo, hub_errors
from tasks.publish.lineage import lineage_of, whole_lineage_of
from tasks.publish.staging import link_all, stage, stage_whole
from tasks.publish.upload import Job, Uploaded, upload
from tasks.specs import PublishSpec

VERSION = 3  # 3: card and recipe tell nothing of the machine
LOCAL_REPO = "local/{name}"
Source = MergedModel | TrainedAdapter | TrainedModel
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    """What is published where; `digest` names the weights."""

    place: str
    repo_id: str
    digest: str
    cache: Path

    @property
    def snapshot(self) -> Path:
        """Where a local publication lies, as in the Hub's own cache."""
        return self.cache / f"models--{self.repo_id.replace('/', '--')}" / "snapshots" / self.digest[:40]


def publish_model(source: Source, spec: PublishSpec, store: ArtifactStore, hub: HfApi) -> PublishedModel:
    """Publish to the Hub when a repo and a token are given, else to a local folder in Hub layout.

    A second call finds the finished one and uploads nothing, unless the Hub holds something else by now.
    Raises: TokenError, RightsError, StorageFullError, AccessError (a public repo where a private one was asked for),
        SpecError, TransientError, CorruptError when what arrived differs from what was sent.
    """
    goal = _aim(source, spec, store, hub)
    pins = {"place": goal.place, "repo_id": goal.repo_id, "digest": goal.digest}
    key = make_key("publish", VERSION, spec, pins, (source,))
    with store.claim(PublishedModel, key) as claim:
        if claim.found and _is_still_there(claim.found, goal, spec, hub):
            return claim.found
        staging = _stage(source, goal, spec, store, hub, claim.folder / "model")
        made, published, url = _send(staging, goal, spec, hub, keep_card=claim.found is not None)
        whole = None if isinstance(source, TrainedAdapter) else source
        artifact = PublishedModel(
            key=key,
            folder=str(claim.folder),
            parents=(source.ref,),
            place=goal.place,
            repo_id=goal.repo_id,
            commit=made.commit,
            url=url,
            model_folder=whole.model_folder if whole and spec.what == "adapter" else str(published),
            model_digest=whole.model_digest if whole else goal.digest,
            what=spec.what,
            revision=made.branch,
            pull_request=made.pull_request,
        )
        return claim.commit(artifact, spec=spec)


def _stage(source: Source, goal: _Goal, spec: PublishSpec, store: ArtifactStore, hub: HfApi, folder: Path) -> Path:
    if isinstance(source, TrainedModel):
        lineage = whole_lineage_of(source, store, hub, goes_to_hub=goal.place == "hub")
        return stage_whole(lineage, spec, goal.repo_id, folder)
    return stage(lineage_of(source, store, hub, goes_to_hub=goal.place == "hub"), spec, goal.repo_id, folder)


def _aim(source: Source, spec: PublishSpec, store: ArtifactStore, hub: HfApi) -> _Goal:
    if isinstance(source, TrainedModel) and spec.what != "merged":
        raise SpecError(f"PublishSpec.what = {spec.what!r}, but {source.origin} is a whole model without an adapter")
    if isinstance(source, TrainedAdapter) and spec.what != "adapter":
        raise SpecError(f"PublishSpec.what = {spec.what!r} needs a merged model, but adapter {source.short} was given")
    digests: dict[str, str] = {}
    if not isinstance(source, TrainedAdapter) and spec.what != "adapter":
        digests["merged"] = source.model_digest
    if spec.what != "merged":
        adapter = source if isinstance(source, TrainedAdapter) else store.ancestor(source, TrainedAdapter)
        digests["adapter"] = adapter.adapter_digest
    wanted = find_repo(spec)
    return _Goal(
        place="hub" if wanted and hub.token else "local",
        repo_id=wanted or LOCAL_REPO.format(name=f"tatara-{source.short}"),
        digest=folder_digest(digests) if len(digests) > 1 else next(iter(digests.values())),
        cache=store.root / "hub",
    )


def _send(staging: Path, goal: _Goal, spec: PublishSpec, hub: HfApi, *, keep_card: bool) -> tuple[Uploaded, Path, str]:
    """Bring the folder to its place. Returns (what was made, the local folder that holds it, its URL)."""
    if goal.place == "hub":
        title = f"Publish {spec.what} {goal.digest[:12]} with Tatara"
        job = Job(hub=hub, repo_id=goal.repo_id, folder=staging, spec=spec, title=title, keep_card=keep_card)
        made = upload(job)
        return made, staging, f"{hub.endpoint}/{goal.repo_id}/tree/{made.commit}"
    made = store_locally(staging, goal.snapshot, (spec.revision, spec.tag))
    wanted = find_repo(spec)
    lacking = f"the repo {wanted} but no token" if wanted else f"no repo{'' if hub.token else ' and token'}"
    logger.info("%s given: published locally at %s", lacking, goal.snapshot)
    return made, goal.snapshot, goal.snapshot.as_uri()


def _is_still_there(found: PublishedModel, goal: _Goal, spec: PublishSpec, hub: HfApi) -> bool:
    """Neither the Hub nor a local snapshot lies in the artifact's folder: its manifest does not watch over them."""
    if found.place == "local":
        return files.list_files(goal.snapshot) == files.list_files(found.path / "model")
    doing = f"looking for {found.repo_id}@{found.revision}"
    info = find_model(hub, found.repo_id, doing, found.revision)
    is_there = info is not None and info.sha == found.commit and (bool(info.private) or not spec.private)
    if is_there and spec.tag:
        with hub_errors(doing):
            is_there = spec.tag in {ref.name for ref in hub.list_repo_refs(found.repo_id).tags}
    if not is_there:
        logger.info("%s@%s is not at commit %s any more", found.repo_id, found.revision, found.commit[:8])
    return is_there


def store_locally(staging: Path, snapshot: Path, refs: tuple[str, ...]) -> Uploaded:
    """Lay `staging` out as the Hub's cache does, so that HF_HUB_CACHE=<cache> finds the repo offline."""
    commit, repo = snapshot.name, snapshot.parent.parent
    partial = snapshot.with_name(f".{commit}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    link_all(staging, partial)
    shutil.rmtree(snapshot, ignore_errors=True)
    partial.rename(snapshot)
    for ref in filter(None, refs):
        files.write_text(repo / "refs" / ref, commit)
    return Uploaded(commit=commit, branch=refs[0])
