"""The nouns that travel between verbs, their keys, and the store that holds them.

    key = sha256(verb, VERSION, spec, pins, parents)      same question -> same folder
    <root>/<kind>/<key[:16]>/manifest.json                written last: present = whole, absent = resume here

Prefect carries an artifact's fields (a few hundred bytes); tensors and rows stay in its folder.
A manifest lists its parents, so a HealthReport leads back to the data set without asking a server.
With a remote (tasks/remote.py) what is committed is also sent there, and what is whole there is brought, not made.

Ring: edge (disk, through tasks/files.py).
"""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import files
from tasks.errors import CorruptError, MissingError, SpecError
from tasks.remote_manifest import MANIFEST, NOTE
from tasks.specs import Spec

if TYPE_CHECKING:
    from tasks.remote import Remote

CHECKPOINTS = "checkpoints"  # removed once the artifact is whole: no part of it
_NOT_LISTED = {
    MANIFEST,
    "output.log",
    "process.json",
    "heartbeat.json",
    NOTE,
}  # a trainer, or a remote, may still write them
_JOB_NOTES = ("slurm_job.json", "ray_job.json")  # of a job that may still work in an artifact's folder
_STAYS_HERE = {"published", "served", "health", "decision"}  # they speak of this machine's endpoint and folders
LATEST = "latest"  # the name of the newest artifact of a kind
logger = logging.getLogger(__name__)


class Artifact(BaseModel):
    """Base of all nouns. `folder` is absolute; `parents` are `kind/key` references."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    kind: ClassVar[str]

    key: str
    folder: str
    parents: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`kind/key`, the way other manifests point here."""
        return f"{self.kind}/{self.key}"

    @property
    def short(self) -> str:
        """The first eight digits of the key, for names of runs and logs."""
        return self.key[:8]

    @property
    def path(self) -> Path:
        """The folder as a Path."""
        return Path(self.folder)


class BaseCheckpoint(Artifact):
    """A model in transformers' layout that can be tuned, merged into and served."""

    kind: ClassVar[str] = "base"
    model_folder: str
    origin: str
    model_digest: str
    num_parameters: int


class TrainedModel(BaseCheckpoint):
    """A whole model that was trained here, without an adapter: what pretrained and reinforced models share."""


class PretrainedModel(TrainedModel):
    """A base trained from scratch here."""

    kind: ClassVar[str] = "pretrained"
    num_steps: int
    first_loss: float
    last_loss: float
    validation_loss: float | None = None  # nats per token of what was held out; None: nothing was


class TokenizedCorpus(Artifact):
    """What a model is pretrained on: `tokens.bin`, `document_ends.bin` and `tokenizer/`.

    `tokens.bin` holds ids of `dtype`, `document_ends.bin` the int64 offset behind each document's last token; both
    little-endian. `pins` are what the names of corpus and tokenizer meant: digests of files, commits of the Hub.
    """

    kind: ClassVar[str] = "corpus"
    source: str
    pins: dict[str, str]
    dtype: str  # "uint16" or "uint32"
    vocab_size: int  # ids of the tokenizer; the model may have more
    num_documents: int
    num_tokens: int


class FetchedDataset(Artifact):
    """`train.parquet`, `validation.parquet` of conversations or texts, and `rejected.jsonl`."""

    kind: ClassVar[str] = "dataset"
    source: str
    revision: str
    is_chat: bool
    num_train_rows: int
    num_validation_rows: int
    num_rejected_rows: int


class PackedDataset(Artifact):
    """`train.parquet` and `validation.parquet` with input_ids, labels and seq_lengths."""

    kind: ClassVar[str] = "packed"
    row_tokens: int
    num_train_rows: int
    num_validation_rows: int
    num_train_documents: int
    num_validation_documents: int
    num_train_tokens: int
    num_learnt_tokens: int
    fill_pct: float


class TrainedAdapter(Artifact):
    """A PEFT adapter, its checkpoints and metrics.jsonl."""

    kind: ClassVar[str] = "adapter"
    adapter_folder: str
    adapter_digest: str
    base_folder: str
    base_digest: str
    num_steps: int
    num_trainable: int
    first_loss: float
    last_loss: float
    validation_loss_before: float
    validation_loss_after: float
    reward_before: float = 0.0  # mean over the first tenth of the steps, of a run that learnt from rewards
    reward_after: float = 0.0  # over the last tenth
    best_step: int = 0  # whose weights it holds, with TrainSpec.keep_best; 0: those of the last step


class MergedModel(Artifact):
    """bf16 safetensors shards, index, tokenizer, template and the merge ledger."""

    kind: ClassVar[str] = "merged"
    model_folder: str
    model_digest: str
    base_folder: str
    num_tensors: int
    num_changed: int
    num_shards: int
    total_bytes: int
    experts: str = "plain"  # or "mxfp4"
    mxfp4_error: float = 0.0  # largest relative error of a tensor that was made MXFP4 again


class PublishedModel(Artifact):
    """Where a model was published, at which commit.

    `model_folder` and `model_digest` are what can be served from here: the merged model, also when only its
    adapter was published; the adapter itself when nothing was merged.
    """

    kind: ClassVar[str] = "published"
    place: str  # "hub" or "local"
    repo_id: str
    commit: str
    url: str
    model_folder: str
    model_digest: str
    what: str = "merged"  # "merged", "adapter" or "both"
    revision: str = "main"  # the branch that was written to, refs/pr/N of a pull request
    pull_request: str = ""  # its URL


class ServedModel(Artifact):
    """A live endpoint: vLLM and the gateway in front."""

    kind: ClassVar[str] = "served"
    model_folder: str
    model_digest: str
    served_model_name: str
    dtype: str  # what it is served in, and so what the reference is computed in
    vllm_url: str
    gateway_url: str
    reused: bool
    candidate_slot: str = ""  # where it waits beside the model that serves; empty: it serves


class HealthReport(Artifact):
    """What was asked of the live endpoint, what it answered, and whether that proves the tune."""

    kind: ClassVar[str] = "health"
    passed: bool
    served_logprob: float
    merged_logprob: float
    base_logprob: float
    token_gap: float
    tuning_gap: float
    num_answers: int
    question: str
    answer: str
    gateway_url: str
    served_model_name: str
    adapter_gap: float = 0.0  # mean |served - base with the adapter, by PEFT|, token by token
    trainer_gain: float = 0.0  # what the trainer's validation loss fell by
    num_greedy_tokens: int = 0  # greedy tokens that were compared


class Evaluation(Artifact):
    """One model, measured: `documents.jsonl`, `questions.jsonl`, `safety.jsonl`, one line an item, `plugins.json`.

    Two with the same `yardstick` (questions, documents, knobs, dtype) can be compared.
    """

    kind: ClassVar[str] = "evaluation"
    model_digest: str
    yardstick: str
    source: str  # "endpoint" or "files"
    validation_loss: float | None  # None: its tokens are not those of the documents
    choice_accuracy: float
    exact_accuracy: float
    safety_preferred: float
    safety_generated: float
    num_documents: int
    num_questions: int
    num_safety: int


class Decision(Artifact):
    """Whether a served candidate may take the incumbent's place, and each reason with its figures."""

    kind: ClassVar[str] = "decision"
    promoted: bool
    reasons: tuple[str, ...]
    model_digest: str
    model_folder: str
    incumbent_digest: str  # empty: there was none
    served_model_name: str


class PreparedQuestions(Artifact):
    """`train.parquet` and `test.parquet` in verl's columns, and `rejected.jsonl`."""

    kind: ClassVar[str] = "questions"
    source: str
    revision: str
    num_train_rows: int
    num_test_rows: int
    num_rejected_rows: int


class ReinforcedModel(TrainedModel):
    """A whole model that was trained with rewards: `model/`, `metrics.jsonl`, `job-<attempt>.log`.

    `test_score_before` and `test_score_after` are verl's means over the test questions; None: it printed none.
    """

    kind: ClassVar[str] = "reinforced"
    base_folder: str
    base_digest: str
    num_steps: int
    test_score_before: float | None
    test_score_after: float | None


A = TypeVar("A", bound=Artifact)
KINDS: dict[str, type[Artifact]] = {
    cls.kind: cls
    for cls in (
        BaseCheckpoint,
        TokenizedCorpus,
        PretrainedModel,
        FetchedDataset,
        PackedDataset,
        TrainedAdapter,
        MergedModel,
        PublishedModel,
        ServedModel,
        HealthReport,
        Evaluation,
        Decision,
        PreparedQuestions,
        ReinforcedModel,
    )
}


def make_key(verb: str, version: int, spec: Spec, pins: dict[str, str], parents: tuple[Artifact, ...] = ()) -> str:
    """Return the key of the artifact that `verb` makes of these inputs.

    Args:
        verb: folder name of the verb.
        version: bumped by hand when the same inputs would give other bytes.
        spec: the knobs.
        pins: what a moving name resolved to (file digest, commit), so that an edited file is a new key.
        parents: artifacts that went in.
    """
    question = [verb, version, spec.key_values(), pins, [parent.ref for parent in parents]]
    return sha256(json.dumps(question, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Claim(Generic[A]):
    """The right to make one artifact: held by one process at a time, across the machine."""

    def __init__(self, store: "ArtifactStore", cls: type[A], key: str, found: A | None) -> None:
        self.store, self.cls, self.key, self.found = store, cls, key, found
        self.folder = store.folder(cls, key)
        self._started = time.monotonic()

    def commit(self, artifact: A, *, spec: Spec, about: dict[str, Any] | None = None) -> A:  # Any: JSON values
        """Write the manifest, last and whole, after all files are on disk; from here on the artifact exists.

        Checkpoints go. With a remote it is sent there; what is returned is what the remote holds, see `share`.
        """
        files.remove_strays(self.folder)
        (self.folder / NOTE).unlink(missing_ok=True)  # it spoke of what was here before
        present = files.list_files(self.folder).items()
        listed = {name: size for name, size in present if name not in _NOT_LISTED and _is_kept(name)}
        for name in listed:
            files.fsync_file(self.folder / name)
        manifest = {
            "kind": artifact.kind,
            "artifact": artifact.model_dump(mode="json", exclude={"folder"}),
            "spec": spec.model_dump(mode="json"),
            "about": about or {},
            "files": listed,
            "created_at": datetime.now(UTC).isoformat(),
            "seconds": round(time.monotonic() - self._started, 3),
            "python": platform.python_version(),
        }
        files.write_json(self.folder / MANIFEST, manifest)
        logger.info("committed %s/%s in %.1f s", artifact.kind, artifact.short, manifest["seconds"])
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # 12 bytes a parameter, of a run that is over
        return self.store.share(artifact)


class ArtifactStore:
    """Artifacts below one root folder of a local or shared POSIX file system, and those of a remote."""

    def __init__(self, root: Path, remote: "Remote | None" = None) -> None:
        self.root, self.remote = root.expanduser().resolve(), remote

    @classmethod
    def default(cls) -> Self:
        """The store at TATARA_HOME, by default `.tatara` in the working directory, with the remote at TATARA_REMOTE."""
        return cls.at(Path(os.environ.get("TATARA_HOME") or ".tatara"))

    @classmethod
    def at(cls, root: Path) -> Self:
        """The store below `root`, with the remote at TATARA_REMOTE where that is set."""
        url = os.environ.get("TATARA_REMOTE", "").strip()
        if not url:
            return cls(root)
        from tasks.remote import Remote  # fsspec: loaded where there is one

        return cls(root, Remote(url))

    def folder(self, cls: type[Artifact], key: str) -> Path:
        """Return the folder of an artifact, whether it exists or not."""
        return self.root / cls.kind / key[:16]

    def manifest(self, cls: type[Artifact], key: str) -> dict[str, Any] | None:  # Any: JSON values
        """Return the manifest of a committed artifact, or None when there is none or it is not whole.

        Whole means: the manifest parses, carries this key, and each listed file is there in its size.
        """
        folder = self.folder(cls, key)
        if not (folder / MANIFEST).exists():
            return None
        try:
            manifest = files.read_json(folder / MANIFEST)
            written_key, changed = manifest["artifact"]["key"], _changed_files(folder, manifest)
        except (CorruptError, KeyError, AttributeError, TypeError) as error:
            logger.warning("%s/%s has an unreadable manifest (%s): making it again", cls.kind, key[:8], error)
            return None
        if written_key != key or changed:
            logger.warning("%s/%s is not whole (%s): making it again", cls.kind, key[:8], ", ".join(changed) or "key")
            return None
        return manifest

    def find(self, cls: type[A], key: str) -> A | None:
        """Return the committed artifact, or None."""
        manifest = self.manifest(cls, key)
        return None if manifest is None else self._read_artifact(cls, manifest["artifact"])

    def _read_artifact(self, cls: type[A], fields: dict[str, Any]) -> A | None:  # Any: JSON values
        key = fields["key"]
        try:
            return cls.model_validate({**fields, "folder": str(self.folder(cls, key))})
        except ValidationError as error:
            logger.warning("%s/%s was written by another version (%s): making it again", cls.kind, key[:8], error)
            return None

    @contextmanager
    def claim(self, cls: type[A], key: str) -> Iterator[Claim[A]]:
        """Hold the artifact's lock; `claim.found` is set when it is already whole, here or in the remote.

        A second run of the same question waits here and then finds the finished answer.
        """
        folder = self.folder(cls, key)
        with self._lock(cls, key):
            found = self.find(cls, key)
            if found is not None:
                logger.info("skipped: %s/%s is already whole at %s", cls.kind, key[:8], folder)
                found = self.share(found)  # made before there was a remote, or while it was away
                _clear_leftovers(folder)
            else:
                _clear_damaged(folder)
                found = self._bring(cls, key)
                folder.mkdir(parents=True, exist_ok=True)
            yield Claim(self, cls, key, found)

    def _lock(self, cls: type[Artifact], key: str) -> AbstractContextManager[None]:
        folder = self.folder(cls, key)
        return files.lock_file(folder.parent / f".{folder.name}.lock", f"{cls.kind}/{key[:8]}")

    def share(self, artifact: A) -> A:
        """Send a whole artifact to the remote, once. Another machine's that was there first takes its place here.

        The caller holds its lock. Raises as Remote.send does: the artifact is whole here, another try only sends.
        """
        cls, folder = type(artifact), self.folder(type(artifact), artifact.key)
        manifest = self.manifest(cls, artifact.key)
        if not self.remote or cls.kind in _STAYS_HERE or manifest is None:
            return artifact
        other = self.remote.send(folder, manifest, self.root)
        if other is None:
            return artifact
        found = self._install(cls, artifact.key, other)
        if found is None:  # its model lies elsewhere: ours stays
            self.remote.note(folder, other)
            return artifact
        logger.warning(
            "another machine made %s/%s too and was the first to send it: its files replaced those made here, so that "
            "what is made of it is the same everywhere", cls.kind, artifact.short
        )  # fmt: skip
        return found

    def _bring(self, cls: type[A], key: str) -> A | None:
        """Return the artifact from the remote when it is whole there; None otherwise. The caller holds its lock."""
        folder = self.folder(cls, key)
        if not self.remote or cls.kind in _STAYS_HERE:
            return None
        from tasks.processes import find_alive

        if find_alive(folder / "process.json") or any((folder / note).exists() for note in _JOB_NOTES):
            return None  # a job that may run works in it: it goes on
        manifest = self.remote.read(f"{cls.kind}/{folder.name}")
        return self._install(cls, key, manifest) if manifest else None  # what a crash left has no use any more

    def _install(self, cls: type[A], key: str, manifest: dict[str, Any]) -> A | None:  # Any: JSON values
        """Bring what a manifest of the remote names, in place of what is here; None when its model is elsewhere.

        Raises: CorruptError when it is no artifact of ours. Then nothing changed here.
        """
        assert self.remote is not None
        folder, fields = self.folder(cls, key), self.remote.fields(manifest, self.root)
        place = f"{cls.kind}/{folder.name}"
        if fields["key"] != key or self._read_artifact(cls, fields) is None:
            raise CorruptError(
                f"{self.remote.url}/{place} is {cls.kind}/{fields['key'][:24]}... of another version of Tatara, or "
                f"damaged: run the same version on each machine, or {self.remote.way_out(place)}"
            )
        arrived = self.remote.fetch(place, manifest, self.root)
        if arrived is None:
            return None
        _put_in_place(arrived, folder)
        return self.find(cls, key)

    def load(self, ref: str) -> Artifact:
        """Return the artifact behind a `kind/key` reference, with its files. Raises MissingError when none is whole."""
        kind, _, key = ref.partition("/")
        found = self.find(KINDS[kind], key) if kind in KINDS else None
        if found is None and self.remote and kind in KINDS:
            with self._lock(KINDS[kind], key):
                found = self.find(KINDS[kind], key) or self._bring(KINDS[kind], key)
        if found is None:
            elsewhere = f" or {self.remote.url}" if self.remote else ""
            raise MissingError(
                f"artifact {ref} is not below {self.root}{elsewhere}: run its flow again, or set TATARA_HOME"
            )
        return found

    def record(self, cls: type[Artifact], key: str) -> dict[str, Any] | None:  # Any: JSON values
        """Return the manifest of an artifact that is whole here, else in the remote; None when it is in neither."""
        manifest = self.manifest(cls, key)
        if manifest is None and self.remote and cls.kind not in _STAYS_HERE:
            manifest = self.remote.peek(f"{cls.kind}/{key[:16]}")
        return manifest if manifest and manifest["artifact"]["key"] == key else None

    def _look_up(self, ref: str) -> Artifact:
        """Return the artifact behind a reference without bringing its files. Raises MissingError."""
        kind, _, key = ref.partition("/")
        cls = KINDS.get(kind)
        manifest = self.record(cls, key) if cls and self.remote else None
        if cls is None or self.remote is None or manifest is None or "root" not in manifest:  # here, or nowhere
            return self.load(ref)
        return self._read_artifact(cls, self.remote.fields(manifest, self.root)) or self.load(ref)

    def known(self, cls: type[A]) -> list[A]:
        """Return every artifact of a kind that is whole here or in the remote, oldest first; `load` brings files."""
        found = self._dated(cls)
        here = {artifact.key for _, artifact in found}
        if self.remote and cls.kind not in _STAYS_HERE:
            for manifest in self.remote.read_all(cls.kind):
                artifact = self._read_artifact(cls, self.remote.fields(manifest, self.root))
                if artifact and artifact.key not in here:
                    found.append((manifest["created_at"], artifact))
        return [artifact for _, artifact in sorted(found, key=lambda pair: pair[0])]

    def committed(self, cls: type[A]) -> list[A]:
        """Return every artifact of a kind that is whole here, oldest first."""
        return [artifact for _, artifact in sorted(self._dated(cls), key=lambda pair: pair[0])]

    def _dated(self, cls: type[A]) -> list[tuple[str, A]]:
        found: list[tuple[str, A]] = []
        for path in (self.root / cls.kind).glob(f"*/{MANIFEST}"):
            if path.parent.name.startswith("."):  # arriving, or on its way out
                continue
            try:
                key = files.read_json(path)["artifact"]["key"]
            except (CorruptError, KeyError, TypeError):
                continue
            artifact = self.find(cls, key)
            if artifact is not None:
                found.append((files.read_json(path)["created_at"], artifact))
        return found

    def choose(self, cls: type[A], name: str, fits: Callable[[A], bool] = lambda _: True) -> A | None:
        """Return the whole artifact whose key begins with `name`, or for `latest` the newest that fits; None without.

        One that is only in the remote is brought. Raises: SpecError when several begin so.
        """
        every = self.known(cls)
        if name == LATEST:
            found = list(islice(filter(fits, reversed(every)), 1))
        else:
            found = [artifact for artifact in every if name and artifact.key.startswith(name)]
        if len(found) > 1:
            fitting = ", ".join(artifact.short for artifact in found)
            raise SpecError(f"{cls.kind} {name!r} may be {fitting}: give more digits of the key")
        return cast("A", self.load(found[0].ref)) if found else None

    def ancestor(self, artifact: Artifact, cls: type[A], *, needs_files: bool = True) -> A:
        """Walk the parents of `artifact` up to the nearest one of kind `cls` (subclasses count).

        One of another kind that was cleared away hides only what lies behind it. With a remote, of those on the way
        only what is written of them is read; the one that is returned is brought, unless `needs_files` is false.
        Raises: MissingError.
        """
        queue, gone = [*artifact.parents], None
        while queue:
            ref = queue.pop(0)
            try:
                parent = self._look_up(ref)
            except MissingError as error:
                if issubclass(KINDS.get(ref.partition("/")[0], Artifact), cls):
                    raise  # a farther one would be another
                gone = gone or error
                continue
            if isinstance(parent, cls):
                return cast("A", self.load(ref)) if needs_files else parent
            queue.extend(parent.parents)
        if gone:
            raise gone
        raise MissingError(f"{artifact.ref} has no {cls.kind} among its ancestors: it was made by another line")


def _is_kept(name: str) -> bool:
    return not name.startswith((f"{CHECKPOINTS}/", "logs/", "heartbeats/", "nodes/"))  # ranks may still write them


def _put_in_place(arrived: Path, folder: Path) -> None:
    """Make `arrived` the folder; what was there goes."""
    damaged = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if folder.exists():
        folder.rename(damaged)
    arrived.rename(folder)
    files.fsync_folder(folder.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a kill left beside a folder that is whole: half of one that arrived, or went."""
    for name in (f".{folder.name}.damaged", f".{folder.name}.arriving"):
        shutil.rmtree(folder.with_name(name), ignore_errors=True)


def _clear_damaged(folder: Path) -> None:
    """Remove a folder that was committed once and is not whole now: nothing tells which of its files are good.

    A folder without a manifest is what a crash left; its step resumes from it.
    """
    damaged = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if (folder / MANIFEST).exists():
        folder.rename(damaged)  # at once: half of a removal would look like a crash
        shutil.rmtree(damaged)


def _changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:  # Any: JSON values
    present = files.list_files(folder)
    return [name for name, size in manifest["files"].items() if present.get(name) != size]


def folder_digest(digests: dict[str, str]) -> str:
    """Return one sha256 for a model folder from its files' digests (`sha256sum` lines, sorted by name).

    >>> folder_digest({"b": "2", "a": "1"}) == folder_digest({"a": "1", "b": "2"})
    True
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return sha256(lines.encode()).hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """Return relative path -> sha256 for each file of a model folder."""
    return {name: files.digest(folder / name) for name in files.list_files(folder)}
