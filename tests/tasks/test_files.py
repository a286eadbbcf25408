"""Files are old or new, never half; what is too large is said with numbers before it is begun."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tasks import files as subject
from tasks.errors import CapacityError, CorruptError, MissingError
from tests.needs import mount_tmpfs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount_tmpfs(folder, "1m")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def test_write_replaces_whole_and_can_be_read_by_others(tmp_path: Path):
    path = tmp_path / "new/folder/x.txt"
    subject.write_text(path, "祭り")
    subject.write_text(path, "餅")
    assert path.read_text() == "餅"
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert subject.list_files(tmp_path) == {"new/folder/x.txt": 3}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_error_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(type(error)), subject.aside(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("had_old", [True, False])
def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path, had_old: bool):
    path = tmp_path / "x"
    if had_old:
        path.write_text("old")
    code = (
        "import sys, time; from pathlib import Path; from tasks import files\n"
        "with files.aside(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('written', flush=True); time.sleep(60)"
    )
    child = _spawn(code, path)
    assert child.stdout is not None and child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (path.read_text() if path.exists() else None) == ("old" if had_old else None)


def test_reader_never_sees_a_half_while_a_writer_is_at_work_and_is_killed(tmp_path: Path):
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from tasks import files; n = 0\n"
        "while True: n += 1; files.write_json(Path(sys.argv[1]), [n] * 5000)"
    )
    child = _spawn(code, path)
    seen: set[int] = set()
    end = time.monotonic() + 20
    while len(seen) < 20 and time.monotonic() < end:
        if path.exists():
            value = subject.read_json(path)
            assert len(value) == 5000 and len(set(value)) == 1
            seen.add(value[0])
    child.kill()
    child.wait()
    assert len(seen) >= 20
    assert len(set(subject.read_json(path))) == 1


def test_full_disk_leaves_the_old_file(small_disk: Path):
    path = small_disk / "x"
    subject.write_bytes(path, b"old")
    with pytest.raises(OSError, match="No space left") as caught:
        subject.write_bytes(path, b"n" * (2 << 20))
    assert not isinstance(caught.value, CapacityError)
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


def test_disk_and_memory_are_asked_for_with_numbers(small_disk: Path):
    assert 0 < subject.free_bytes(small_disk / "not" / "there" / "yet") <= 1 << 20
    subject.require_disk(small_disk, 1000, "merging")
    with pytest.raises(
        CapacityError, match=r"merging needs about 41\.0 GB below .*disk but only 0\.0 GB are free: free"
    ):
        subject.require_disk(small_disk, 41_000_000_000, "merging")


def test_torn_json_is_named(tmp_path: Path):
    for content in (b'{"a": [1,', b"\xff\xfe", b""):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(CorruptError, match=r"x\.json is not JSON \(.*delete it, its step will make it again"):
            subject.read_json(tmp_path / "x.json")


@given(st.binary(max_size=4096))
def test_digest_is_sha256(tmp_path_factory, data: bytes):
    from hashlib import sha256

    path = tmp_path_factory.mktemp("d") / "x"
    path.write_bytes(data)
    assert subject.digest(path) == sha256(data).hexdigest()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path, {"format": "pt"})
    return path


def test_header_tells_names_shapes_and_where_data_begins(shard: Path):
    header, start = subject.read_safetensors_header(shard)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("BF16", [5]),
    }
    begin, end = header["a"]["data_offsets"]
    values = shard.read_bytes()[start + begin : start + end]
    assert torch.frombuffer(bytearray(values), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@given(st.data())
def test_every_truncation_of_a_shard_is_noticed(shard: Path, data: st.DataObject):
    whole = shard.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    torn = shard.with_name("torn.safetensors")
    torn.write_bytes(whole[:cut])
    with pytest.raises(CorruptError, match=r"torn\.safetensors.*download or make it again"):
        subject.read_safetensors_header(torn)


def test_shard_that_is_too_long_or_garbage_is_noticed(shard: Path):
    other = shard.with_name("other.safetensors")
    other.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(CorruptError, match=r"has \d+ bytes but its header describes \d+"):
        subject.read_safetensors_header(other)
    other.write_bytes(b"\x08" + b"\0" * 7 + b"notjson!" + b"\0" * 50)
    with pytest.raises(CorruptError, match="torn safetensors header"):
        subject.read_safetensors_header(other)
    other.write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptError, match="no whole safetensors header"):
        subject.read_safetensors_header(other)


def test_waiting_for_a_lock_is_said_once_and_a_free_one_takes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "tasks.files")
    with subject.lock_file(tmp_path / "lock", "dataset/0123"):
        assert caplog.messages == []
        waiting = threading.Thread(target=_take, args=(tmp_path / "lock",))
        waiting.start()
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waiting.is_alive()
    waiting.join(10)
    assert caplog.messages == ["waiting for another run that makes dataset/0123"] and not waiting.is_alive()


def _take(path: Path) -> None:
    with subject.lock_file(path, "dataset/0123"):
        pass


def test_weights_are_those_of_the_index_or_the_single_or_the_only_file(tmp_path: Path):
    assert subject.weight_files(tmp_path) == []
    (tmp_path / "adapter_model.safetensors").touch()
    assert subject.weight_files(tmp_path) == [tmp_path / "adapter_model.safetensors"]
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(MissingError, match=r"has 2 safetensors files but no model\.safetensors\.index\.json that says"):
        subject.weight_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert subject.weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    weight_map = {"a": "b.safetensors", "b": "a.safetensors", "c": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert subject.weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_second_holder_of_a_lock_waits_and_a_killed_one_leaves_none(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from tasks import files\n"
        "with files.lock_file(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    first = _spawn(code, tmp_path / "lock")
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    second = _spawn(code, tmp_path / "lock")
    assert second.stdout is not None and select.select([second.stdout], [], [], 0.8)[0] == []
    first.kill()
    first.wait()
    assert second.stdout.readline() == "held\n"
    second.kill()
    second.wait()
