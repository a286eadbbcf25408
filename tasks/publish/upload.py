"""Upload a folder as one commit, and read back what arrived.

    whoami, rights, privacy -> branch or pull request -> compare with its tree -> send what is missing
    -> one commit on top of the head that was compared -> checksums of that commit -> tag

Each step looks before it acts, so it can be run again after any failure: nothing is sent or committed twice.

Ring: edge.
"""

import logging
import time
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.utils import (
    DEFAULT_IGNORE_PATTERNS,
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
)

from tasks import files
from tasks.errors import CorruptError, MissingError, RateLimitError, SpecError, TransientError
from tasks.hub import hub_errors, refuse_public, require_target
from tasks.publish.plan import CARD, Stored, UploadPlan, plan_upload, stale_paths
from tasks.specs import PublishSpec

_GIT_FILES = [".gitignore", "*/.gitignore", ".gitattributes"]  # they would tell the Hub to drop or inline weights
_NO_RULES = "# every file counts\n"  # sent in place of a .gitignore that the repo may hold
_MAX_WAIT_S = 900
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """Where the folder lies now."""

    commit: str
    branch: str
    pull_request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One folder on its way to one repo."""

    hub: HfApi
    repo_id: str
    folder: Path
    spec: PublishSpec
    title: str
    keep_card: bool

    @property
    def doing(self) -> str:
        """What errors begin with."""
        return f"publishing to {self.repo_id}"


def upload(job: Job) -> Uploaded:
    """Make the branch (or a pull request) hold the folder; sends only what is missing there.

    Where the Hub asks for patience (429 with a time), it waits and goes on; at most 15 minutes in all.
    Raises: TokenError, RightsError, StorageFullError, AccessError (public repo), SpecError (card, tag, branch);
        TransientError; CorruptError when what arrived differs from what was sent.
    """
    deadline = time.monotonic() + _MAX_WAIT_S
    while True:
        try:
            return _upload(job)
        except RateLimitError as error:
            if not error.retry_after_s or time.monotonic() + error.retry_after_s > deadline:
                raise
            logger.warning("%s", error)
            time.sleep(error.retry_after_s)


def _upload(job: Job) -> Uploaded:
    hub, repo_id, spec = job.hub, job.repo_id, job.spec
    sizes = _sizes(job)
    require_target(hub, repo_id, job.doing, private=spec.private, create_pr=spec.create_pr)
    with hub_errors(job.doing):
        if not spec.create_pr or not hub.repo_exists(repo_id):
            hub.create_repo(repo_id, private=spec.private, exist_ok=True)
        refuse_public(hub.model_info(repo_id), job.doing, private=spec.private)  # exist_ok leaves a public repo public
        tagged = _require_tag(job, sizes)
        branch = _open_branch(job)
        head = _head(job, branch)
        plan = _plan(job, sizes, head)
    if plan.is_empty:
        logger.info("%s@%s holds it already, at commit %s", repo_id, branch, head[:8])
        commit = head
    else:
        _check_card(job)
        commit, branch = _commit(job, plan, branch, head)
        _verify(job, commit)
    if spec.tag and not tagged:
        with hub_errors(job.doing):
            hub.create_tag(repo_id, tag=spec.tag, revision=commit)
    number = branch.removeprefix("refs/pr/")
    pull = f"{hub.endpoint}/{repo_id}/discussions/{number}" if number != branch else ""
    return Uploaded(commit=commit, branch=branch, pull_request=pull)


def _sizes(job: Job) -> dict[str, int]:
    """Return path -> bytes of each file that is published."""
    here = files.list_files(job.folder)
    ignored = [*job.spec.ignore_patterns, *_GIT_FILES, *DEFAULT_IGNORE_PATTERNS]
    sizes = {name: here[name] for name in filter_repo_objects(here, ignore_patterns=ignored)}
    lost = [path.name for path in files.weight_files(job.folder) if path.name not in sizes]
    if lost:
        raise SpecError(
            f"PublishSpec.ignore_patterns = {list(job.spec.ignore_patterns)} leaves out the weights {lost[0]}: "
            "a model without them can't be loaded, narrow the patterns"
        )
    return sizes


def _require_tag(job: Job, sizes: dict[str, int]) -> bool:
    """Say whether the tag is there and holds these files. Raises SpecError when it holds something else."""
    tag = job.spec.tag
    if not tag and job.spec.revision in ("main", ""):
        return False
    refs = job.hub.list_repo_refs(job.repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if job.spec.revision in tags:
        raise SpecError(
            f"{job.doing}: PublishSpec.revision = {job.spec.revision!r} is a tag there, and tags can't be written to: "
            "name a branch in revision, and the tag in PublishSpec.tag"
        )
    if tag in tags and not _plan(job, sizes, tags[tag]).is_empty:
        raise SpecError(
            f"{job.doing}: PublishSpec.tag = {tag!r} is at commit {tags[tag][:8]} there, which holds something else: "
            "choose another tag, or delete that one on the Hub"
        )
    return tag in tags


def _open_branch(job: Job) -> str:
    """Return the branch to compare with and to write to; a new one is made, an open pull request is found again."""
    hub, repo_id, branch = job.hub, job.repo_id, job.spec.revision
    if job.spec.create_pr:
        return _find_pull(job) or "main"
    if branch != "main" and not branch.startswith("refs/pr/"):
        hub.create_branch(repo_id, branch=branch, exist_ok=True)
    return branch


def _find_pull(job: Job) -> str:
    """Return the branch of the open pull request of this very model, "" when there is none."""
    found = job.hub.get_repo_discussions(job.repo_id, discussion_type="pull_request", discussion_status="open")
    return next((f"refs/pr/{pull.num}" for pull in found if pull.title == job.title), "")


def _head(job: Job, branch: str) -> str:
    sha = job.hub.model_info(job.repo_id, revision=branch).sha
    if sha is None:
        raise MissingError(f"{job.doing}: the Hub names no commit for {branch}; look at its page")
    return sha


def _plan(job: Job, sizes: dict[str, int], commit: str) -> UploadPlan:
    """Compare the folder with a commit. Cost: reads the files that have their size there."""
    tree = job.hub.list_repo_tree(job.repo_id, revision=commit, recursive=True)
    there = {
        entry.path: Stored(size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else "", blob_id=entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    kept = {CARD} & there.keys() if job.keep_card else set[str]()  # a person may have written on in it
    wanted = {path: size for path, size in sizes.items() if path not in kept}
    return plan_upload(wanted, there, lambda path, stored: _is_same(job.folder / path, stored))


def _is_same(path: Path, stored: Stored) -> bool:
    if stored.sha256:
        return files.digest(path) == stored.sha256
    data = path.read_bytes()  # no LFS file: small
    return sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == stored.blob_id


def _check_card(job: Job) -> None:
    """Let the Hub look at the card's front matter before the first gigabyte moves. Raises SpecError."""
    card = job.folder / CARD
    if not card.is_file():
        return
    with hub_errors(f"{job.doing}: checking the model card"):
        answer = get_session().post(
            f"{job.hub.endpoint}/api/validate-yaml",
            json={"content": card.read_text(), "repoType": "model"},
            headers=build_hf_headers(token=job.hub.token),
        )
        if answer.status_code == 404:  # a Hub that does not know this question
            return
        if answer.status_code == 400:
            faults = "; ".join(str(fault.get("message")) for fault in answer.json().get("errors", []))
            raise SpecError(f"{job.doing}: the Hub refuses the model card's front matter: {faults}")
        hf_raise_for_status(answer)


def _commit(job: Job, plan: UploadPlan, branch: str, head: str) -> tuple[str, str]:
    """Send what is missing and commit everything at once. Returns (commit, branch).

    The commit names its parent, so a commit that came in between, or our own whose answer was lost, is never
    followed by a second one.
    """
    hub, creates = job.hub, job.spec.create_pr and branch == "main"
    added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=job.folder / path) for path in plan.add]
    deleted = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in plan.delete]
    size = sum((job.folder / path).stat().st_size for path in plan.add)
    logger.info("%s: %d files, %.3f GB; %d stale ones go", job.doing, len(added), size / 1e9, len(deleted))
    try:
        with hub_errors(job.doing):
            hub.preupload_lfs_files(
                job.repo_id,
                additions=added,
                revision=branch,
                create_pr=creates,
                free_memory=False,
                gitignore_content=_NO_RULES,
            )
            made = hub.create_commit(
                job.repo_id,
                operations=[*deleted, *added],
                commit_message=job.title,
                revision=branch,
                parent_commit=head,
                create_pr=creates,
            )
    except TransientError as error:
        return _settle(job, branch, head, error)
    return made.oid, made.pr_revision or branch


def _settle(job: Job, branch: str, head: str, error: TransientError) -> tuple[str, str]:
    """A commit may be there although its answer was lost: look at the branch. Raises `error` when it is not."""
    with hub_errors(job.doing):
        found = _open_branch(job)
        commit = _head(job, found)
        if (found, commit) == (branch, head) or not _plan(job, _sizes(job), commit).is_empty:
            raise error
    logger.warning("%s: commit %s is there although the answer was lost (%s)", job.doing, commit[:8], error)
    return commit, found


def _verify(job: Job, commit: str) -> None:
    """Compare the checksums of a commit with the files here.

    `extra_paths` are here but not there; `missing_paths` are there but not here: .gitattributes, which the Hub
    makes itself, or a person's own files.
    Raises: CorruptError when the commit lacks, changes or adds to what was sent.
    """
    with hub_errors(f"{job.doing}: reading back"):
        found = job.hub.verify_repo_checksums(job.repo_id, revision=commit, local_dir=job.folder)
    sizes = _sizes(job)
    changed = [
        bad["path"] for bad in found.mismatches if bad["path"] in sizes and not (job.keep_card and bad["path"] == CARD)
    ]
    dropped = [path for path in found.extra_paths if path in sizes]
    stale = stale_paths(sizes, found.missing_paths)
    if changed or dropped or stale:
        raise CorruptError(
            f"{job.doing}: commit {commit[:8]} differs from what was sent: changed {changed}, not stored {dropped}, "
            f"not ours {stale}; run it again, and look for a .gitignore in the repo"
        )
