"""Both ways to the disk write the same bytes, and say the same of what is broken."""

import fcntl
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tasks import files
from tasks.errors import CorruptError
from tasks.merge import output as subject
from tasks.merge import run
from tests.merging import EXPERTS, stream, write_adapter, write_base
from tests.needs import mount_tmpfs
from tests.tiny import SHAPE

WAYS = [subject.CachedFile, subject.DirectFile]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 << 20), max_size=6))
def test_what_was_written_is_in_the_file_whatever_its_pieces(tmp_path_factory, way, sizes):
    data = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.mktemp("out") / "shard"
    with path.open("w+b", buffering=0) as handle:
        out = way(handle.fileno())
        for piece in data:
            out.write(memoryview(piece))
        out.finish()
        assert handle.tell() == sum(sizes)
    assert path.read_bytes() == b"".join(data)


def test_blocks_really_go_past_the_cache_and_a_refused_one_goes_through_it(tmp_path):
    path = tmp_path / "shard"
    with path.open("w+b", buffering=0) as handle:
        out = subject.DirectFile(handle.fileno())
        flags = [_is_direct(handle)]
        out.write(memoryview(b"a" * 1000))
        out._write_block()  # no whole block: the kernel refuses it with EINVAL, as a disk with larger blocks would
        flags.append(_is_direct(handle))
        out.write(memoryview(b"b" * (5 << 20)))
        out.finish()
    assert flags == [True, False]
    assert path.read_bytes() == b"a" * 1000 + b"b" * (5 << 20)


def _is_direct(handle):
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_an_error_not_a_short_file(tmp_path, request, way):
    mount_tmpfs(tmp_path, "6m")
    request.addfinalizer(lambda: os.system(f"umount -l {tmp_path}"))
    with (tmp_path / "shard").open("w+b", buffering=0) as handle:
        out = way(handle.fileno())
        with pytest.raises(OSError, match="No space left"):
            for _ in range(8):
                out.write(memoryview(bytes(1 << 20)))
            out.finish()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    base = write_base(folder / "base", SHAPE)
    return base, write_adapter(folder / "adapter", SHAPE, target_modules=["q_proj"], target_parameters=EXPERTS)


def test_both_ways_make_the_same_model(parts, tmp_path, monkeypatch):
    ledgers = []
    for name, past_cache in (("cached", False), ("direct", True)):
        monkeypatch.setattr(run, "goes_past_cache", lambda *_, chosen=past_cache: chosen)
        ledgers.append(stream(*parts, tmp_path / name, shard_bytes=1_000_000))
        digests = {shard: files.digest(tmp_path / name / shard) for shard in ledgers[-1]["shards"]}
        assert digests == ledgers[-1]["shards"]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_copied_value_that_is_not_finite_is_named(parts, tmp_path, monkeypatch, past_cache):
    base = tmp_path / "base"
    base.mkdir()
    for path in parts[0].iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (shard,) = base.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    monkeypatch.setattr(run, "goes_past_cache", lambda *_: past_cache)
    with pytest.raises(CorruptError, match=r"layers\.1\.self_attn\.k_proj\.weight holds a value that is not finite"):
        stream(base, parts[1], tmp_path / "out")


@pytest.mark.parametrize(("cores", "num_bytes", "expected"), [(2, 1, True), (32, 1, False), (32, 1 << 60, True)])
def test_the_cache_is_left_alone_where_cores_are_few_or_it_is_too_small(
    tmp_path, monkeypatch, cores, num_bytes, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    source = tmp_path / "base"
    source.write_bytes(bytes(subject.BLOCK_BYTES))
    with source.open("rb") as handle:
        shares = subject._shares_extents(handle.fileno(), tmp_path)  # where it can, it should
        assert subject.goes_past_cache(num_bytes, handle.fileno(), tmp_path) == (expected and not shares)
