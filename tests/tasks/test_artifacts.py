"""A folder is an artifact only when its manifest says so and every file is there; keys name questions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import artifacts as subject
from tasks import files
from tasks.artifacts import ArtifactStore, FetchedDataset, PackedDataset, TrainedAdapter
from tasks.errors import MissingError
from tasks.specs import Spec

ROOT = Path(__file__).resolve().parents[2]
KEY = "ab" * 32


class Knobs(Spec):
    """A spec of this test's own: the golden key below must not move when a real one gets a field."""

    size: int = 3
    name: str = "祭り"


def _dataset(key: str, folder: Path, parents: tuple[str, ...] = ()) -> FetchedDataset:
    return FetchedDataset(
        key=key,
        folder=str(folder),
        parents=parents,
        source="x.jsonl",
        revision="r",
        is_chat=True,
        num_train_rows=2,
        num_validation_rows=1,
        num_rejected_rows=0,
    )


def _packed(key: str, folder: Path, parents: tuple[str, ...]) -> PackedDataset:
    names = [name for name in PackedDataset.model_fields if name.startswith(("num", "row", "fill"))]
    return PackedDataset(key=key, folder=str(folder), parents=parents, **dict.fromkeys(names, 1))


def _commit(store: ArtifactStore, key: str = KEY) -> FetchedDataset:
    with store.claim(FetchedDataset, key) as claim:
        assert claim.found is None
        files.write_text(claim.folder / "train.parquet", "rows")
        files.write_text(claim.folder / "deep/validation.parquet", "row")
        return claim.commit(_dataset(key, claim.folder), spec=Knobs(), about={"note": "x"})


def _make_rows(store: ArtifactStore, rows: str) -> FetchedDataset:
    with store.claim(FetchedDataset, KEY) as claim:
        if claim.found:
            return claim.found
        files.write_text(claim.folder / "train.parquet", rows)
        return claim.commit(_dataset(KEY, claim.folder).model_copy(update={"source": rows}), spec=Knobs())


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def test_golden_key():
    """This value is what folders on other machines are called: it may change only together with every VERSION."""
    parent = _dataset("cd" * 32, Path("/x"))
    key = subject.make_key("fetch", 1, Knobs(), {"commit": "abc"}, (parent,))
    assert key == "7834947786a53cbe5645e3e90bea484e9a7b3c5e913cce24312c0a486c9dfa0b"


questions = st.tuples(
    st.sampled_from(["fetch", "pack"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["1", "2"])),
    st.lists(st.sampled_from(["00" * 32, "11" * 32]), max_size=2),
)


def _key(question: tuple[str, int, int, dict[str, str], list[str]], folder: str = "/x") -> str:
    verb, version, size, pins, parents = question
    artifacts = tuple(_dataset(key, Path(folder)) for key in parents)
    return subject.make_key(verb, version, Knobs(size=size), pins, artifacts)


@given(questions, questions)
def test_keys_agree_exactly_when_the_questions_do(one: Any, other: Any):
    assert (_key(one) == _key(other)) is (one == other)
    assert _key(one, "/here") == _key(one, "/elsewhere")  # where an artifact lies is no part of the question
    swapped = (one[0], one[1], one[2], dict(reversed(one[3].items())), one[4])
    assert _key(swapped) == _key(one)


def test_key_tells_kinds_of_parents_apart():
    made = _dataset(KEY, Path("/x")), _packed(KEY, Path("/x"), ())
    keys = {subject.make_key("v", 1, Knobs(), {}, (parent,)) for parent in made}
    assert len(keys) == 2


def test_committed_artifact_is_found_with_every_field(store: ArtifactStore):
    made = _commit(store)
    assert store.find(FetchedDataset, KEY) == made
    assert made.path == store.root / "dataset" / KEY[:16]
    manifest = store.manifest(FetchedDataset, KEY)
    assert manifest is not None
    assert manifest["files"] == {"deep/validation.parquet": 3, "train.parquet": 4}
    assert (manifest["kind"], manifest["spec"], manifest["about"]) == (
        "dataset",
        {"size": 3, "name": "祭り"},
        {"note": "x"},
    )
    assert (made.ref, made.short) == (f"dataset/{KEY}", KEY[:8])


def test_store_can_be_moved(store: ArtifactStore, tmp_path: Path):
    _commit(store)
    store.root.rename(tmp_path / "moved")
    found = ArtifactStore(tmp_path / "moved").find(FetchedDataset, KEY)
    assert found is not None and found.path == tmp_path / "moved/dataset" / KEY[:16]


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _tear_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def _remove_file(folder: Path) -> None:
    (folder / "train.parquet").unlink()


def _truncate_file(folder: Path) -> None:
    (folder / "deep/validation.parquet").write_text("ro")


def _change_key(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(KEY, "00" * 32))


def _change_fields(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_train_rows"', '"rows_of_another_version"'))


def _write(text: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)

    return damage


DAMAGE = [
    _remove_manifest,
    _tear_manifest,
    _remove_file,
    _truncate_file,
    _change_key,
    _change_fields,
    _write(""),
    _write("[]"),
    _write("null"),
    _write('{"files": {}}'),
    _write('{"files": {}, "artifact": null}'),
    _write('{"files": [], "artifact": {"key": "' + KEY + '"}}'),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_artifact_is_never_found_and_is_made_again(store: ArtifactStore, damage: Any):
    folder = _commit(store).path
    damage(folder)
    assert store.find(FetchedDataset, KEY) is None
    assert store.committed(FetchedDataset) == []
    with pytest.raises(MissingError, match=f"artifact dataset/{KEY} is not below .*home: run its flow again"):
        store.load(f"dataset/{KEY}")
    again = _commit(store)
    assert store.find(FetchedDataset, KEY) == again
    assert (again.path / "deep/validation.parquet").read_text() == "row"


def test_damaged_artifact_is_cleared_but_what_a_crash_left_is_kept(store: ArtifactStore):
    """A step resumes from its own leftovers, so those of a damaged artifact must be gone."""
    folder = _commit(store).path
    (folder / "train.parquet").write_text("r")  # truncated after it was committed
    with store.claim(FetchedDataset, KEY) as claim:
        assert claim.found is None
        assert files.list_files(claim.folder) == {}
        files.write_text(claim.folder / "checkpoint-3", "x")
    with store.claim(FetchedDataset, KEY) as claim:
        assert claim.found is None
        assert files.list_files(claim.folder) == {"checkpoint-3": 1}
    assert not folder.with_name(f".{folder.name}.damaged").exists()


def test_unlisted_files_do_not_matter(store: ArtifactStore):
    made = _commit(store)
    (made.path / "notes.txt").write_text("mine")
    assert store.find(FetchedDataset, KEY) == made


MAKE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.tasks.test_artifacts import _dataset, Knobs, KEY
from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks import files
store = ArtifactStore(Path(sys.argv[1]))
print("asking", flush=True)
with store.claim(FetchedDataset, KEY) as claim:
    print("found" if claim.found else "making", flush=True)
    if not claim.found:
        files.write_text(claim.folder / "train.parquet", "rows")
        print("written", flush=True)
        if sys.argv[2] == "hang":
            time.sleep(60)
        sys.stdin.readline()
        claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
        print("committed", flush=True)
"""


def _maker(store: ArtifactStore, mode: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", MAKE.format(tests=str(ROOT)), str(store.root), mode]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, bufsize=1)


def _say(maker: subprocess.Popen[str]) -> str:
    assert maker.stdout is not None
    return maker.stdout.readline().strip()


def test_kill_9_between_files_and_commit_leaves_nothing_that_is_found(store: ArtifactStore):
    maker = _maker(store, "hang")
    assert [_say(maker) for _ in range(3)] == ["asking", "making", "written"]
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert (store.folder(FetchedDataset, KEY) / "train.parquet").read_text() == "rows"
    assert store.find(FetchedDataset, KEY) is None
    assert store.committed(FetchedDataset) == []
    assert _commit(store) == store.find(FetchedDataset, KEY)  # the dead process holds no lock


def test_second_process_waits_and_finds_it_made(store: ArtifactStore):
    first, second = _maker(store, "commit"), _maker(store, "commit")
    try:
        assert {_say(first), _say(second)} == {"asking"}
        folder = store.folder(FetchedDataset, KEY)
        deadline = time.monotonic() + 20
        while not (folder / "train.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.4)
        assert not (folder / "manifest.json").exists()  # neither has committed: one makes, one waits
        for maker in (first, second):
            assert maker.stdin is not None
            maker.stdin.write("go\n")
            maker.stdin.flush()
        said = sorted(maker.stdout.read().split() for maker in (first, second) if maker.stdout)
        assert said == [["found"], ["making", "written", "committed"]]
    finally:
        first.kill()
        second.kill()
    assert store.find(FetchedDataset, KEY) is not None


def test_ancestors_are_found_through_several_parents(store: ArtifactStore):
    dataset = _commit(store)
    other = _commit(store, "ef" * 32)
    with store.claim(PackedDataset, "01" * 32) as claim:
        packed = claim.commit(_packed("01" * 32, claim.folder, (dataset.ref, other.ref)), spec=Knobs())
    fields = {
        name: 1 for name in TrainedAdapter.model_fields if name.startswith(("num", "first", "last", "validation"))
    }
    words = {name: "x" for name in TrainedAdapter.model_fields if name.startswith(("adapter", "base"))}
    adapter = TrainedAdapter(key="02" * 32, folder="/x", parents=(packed.ref,), **fields, **words)
    assert store.ancestor(adapter, PackedDataset) == packed
    assert store.ancestor(adapter, FetchedDataset) == dataset  # the nearest, in the order of its parents
    with pytest.raises(MissingError, match=rf"adapter/{'02' * 32} has no merged among its ancestors"):
        store.ancestor(adapter, subject.MergedModel)
    (dataset.path / "manifest.json").unlink()
    with pytest.raises(MissingError, match=f"artifact dataset/{KEY} is not below"):
        store.ancestor(adapter, FetchedDataset)


def test_a_parent_that_was_cleared_away_hides_no_other(store: ArtifactStore):
    dataset = _commit(store)
    packed = _packed("01" * 32, Path("/x"), ("questions/" + "ef" * 32, dataset.ref))
    assert store.ancestor(packed, FetchedDataset) == dataset
    with pytest.raises(MissingError, match="artifact questions/efef"):
        store.ancestor(packed, subject.PreparedQuestions)
    with pytest.raises(MissingError, match="artifact questions/efef"):  # it may have had one
        store.ancestor(packed, subject.BaseCheckpoint)


def test_subclass_counts_as_ancestor(store: ArtifactStore):
    numbers = {"num_parameters": 1, "num_steps": 1, "first_loss": 2.0, "last_loss": 1.0}
    with store.claim(subject.PretrainedModel, KEY) as claim:
        base = subject.PretrainedModel(
            key=KEY, folder=str(claim.folder), model_folder="m", origin="o", model_digest="d", **numbers
        )
        claim.commit(base, spec=Knobs())
    packed = _packed("01" * 32, Path("/x"), (base.ref,))
    assert store.ancestor(packed, subject.BaseCheckpoint) == base


def test_committed_lists_oldest_first(store: ArtifactStore):
    keys = [f"{number:02}" * 32 for number in (7, 1, 4)]
    made = []
    for key in keys:
        made.append(_commit(store, key))
        time.sleep(0.002)
    assert store.committed(FetchedDataset) == made
    assert store.committed(PackedDataset) == []


def test_unknown_kind_is_missing(store: ArtifactStore):
    with pytest.raises(MissingError, match=r"artifact nothing/12 is not below .* or set TATARA_HOME"):
        store.load("nothing/12")


def test_every_kind_is_known_by_its_name():
    classes = {cls for cls in vars(subject).values() if isinstance(cls, type) and issubclass(cls, subject.Artifact)}
    assert set(subject.KINDS.values()) == classes - {subject.Artifact, subject.TrainedModel}  # nothing is only that
    assert all(subject.KINDS[kind].kind == kind for kind in subject.KINDS)


def test_default_store_is_tatara_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert ArtifactStore.default().root == tmp_path / "home"
    monkeypatch.delenv("TATARA_HOME")
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore.default().root == tmp_path / ".tatara"


def test_folder_digest_sees_names_and_contents(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    before = subject.folder_digest(subject.digest_files(tmp_path))
    (tmp_path / "a").rename(tmp_path / "c")
    renamed = subject.folder_digest(subject.digest_files(tmp_path))
    (tmp_path / "c").rename(tmp_path / "a")
    assert subject.folder_digest(subject.digest_files(tmp_path)) == before != renamed
