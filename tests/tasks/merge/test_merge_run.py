"""A merge is whole or not there: killed, out of disk, twice at once, with a base or an adapter that is broken."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tasks import files
from tasks.artifacts import ArtifactStore, FetchedDataset, MergedModel, PackedDataset, TrainedAdapter, digest_files
from tasks.errors import CapacityError, CorruptError, MissingError, ServiceError, ShapeError
from tasks.merge import output
from tasks.merge import run as subject
from tasks.merge.report import ledger_markdown
from tasks.specs import BaseModelSpec, FetchSpec, GptOssShape, LoraSpec, MergeSpec, PackSpec, TrainSpec
from tasks.train.run import find_adapter
from tests.merging import ATTENTION, EXPERTS, stream, write_adapter, write_base
from tests.needs import mount_tmpfs
from tests.tasks.publish.conftest import _commit
from tests.tiny import SHAPE, byte_tokenizer, make_base, save_model

SPEC = MergeSpec(shard_bytes=1_000_000)
WIDE = GptOssShape.model_validate({**SHAPE.model_dump(), "hidden_size": 128, "intermediate_size": 128, "num_layers": 6})
Made = tuple[ArtifactStore, TrainedAdapter, MergedModel]
ROOT = Path(__file__).resolve().parents[3]


def make_adapter(store: ArtifactStore, folder: Path) -> TrainedAdapter:
    """An adapter on q_proj and down_proj, committed with its lineage; nothing is trained."""
    base = make_base(store, folder / "base")
    rows = {"num_train_rows": 8, "num_validation_rows": 2}
    data = {**rows, "source": "shipped", "revision": "a" * 64, "is_chat": True, "num_rejected_rows": 0}
    dataset = _commit(store, FetchedDataset, FetchSpec(source="shipped"), (), **data)
    counts = {"num_train_documents": 8, "num_validation_documents": 2, "num_train_tokens": 9, "num_learnt_tokens": 3}
    packed = _commit(store, PackedDataset, PackSpec(), (dataset,), **rows, **counts, row_tokens=128, fill_pct=90.0)
    write_adapter(folder / "adapter", SHAPE, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    losses = {"first_loss": 3.0, "last_loss": 2.0, "validation_loss_before": 3.0, "validation_loss_after": 2.0}
    places = {"adapter_folder": str(folder / "adapter"), "adapter_digest": "d" * 64}
    origin = {"base_folder": base.model_folder, "base_digest": base.model_digest, "num_steps": 1, "num_trainable": 64}
    spec = TrainSpec(lora=LoraSpec(rank=8, alpha=16, target_modules=("q_proj",)))
    return _commit(store, TrainedAdapter, spec, (packed, base), **losses, **places, **origin)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whole merge, PEFT's check included."""
    folder = tmp_path_factory.mktemp("made")
    store = ArtifactStore(folder / "home")
    adapter = make_adapter(store, folder)
    return store, adapter, subject.merge_adapter(adapter, SPEC, store)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 5 MB in two files, and an adapter on all of it."""
    folder = tmp_path_factory.mktemp("wide")
    write_base(folder / "base", WIDE, shard_bytes=3_000_000)
    byte_tokenizer().save_pretrained(folder / "base")
    write_adapter(folder / "adapter", WIDE, target_modules=ATTENTION, target_parameters=EXPERTS)
    return folder


def test_a_merge_is_committed_with_ledger_digests_and_pefts_word(made: Made):
    store, adapter, merged = made
    model = Path(merged.model_folder)
    ledger, about = files.read_json(model / subject.LEDGER), store.manifest(type(merged), merged.key)["about"]
    assert ledger["shards"] == {name: files.digest(model / name) for name in ["model.safetensors"]}
    assert about["digests"] == digest_files(model)
    assert about["peft"] == {"tensors": 4, "values": 2 * (32 * 32 + 2 * 32 * 32), "largest_gap": 0.0}
    stored = load_file(Path(adapter.adapter_folder) / "adapter_model.safetensors")
    assert {row["tensor"]: row["shape"] for row in ledger["adapter"]} == {k: list(v.shape) for k, v in stored.items()}
    for row in ledger["adapter"]:
        assert row["norm"] == pytest.approx(stored[row["tensor"]].norm().item(), rel=1e-5)
        assert row["shard"] == "model.safetensors"
        assert row["target"].startswith(row["tensor"].removeprefix("base_model.model.").split(".lora_")[0])
    assert (merged.num_changed, merged.experts, merged.mxfp4_error) == (4, "plain", 0.0)
    assert "quantization_config" not in files.read_json(model / "config.json")
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= set(files.list_files(model))
    text = ledger_markdown(merged, about)
    assert "4 of 37 tensors changed" in text and "differs" not in text and "6,144 values of 4 tensors" in text
    assert subject.merge_adapter(adapter, SPEC, store) == merged


def write_until_killed(wide: Path, target: Path, seconds: float) -> None:
    """Merge in a process that dies by SIGKILL after so many seconds."""
    pid = os.fork()
    if pid == 0:
        write = os.write

        def slow(handle: int, data: bytes) -> int:  # so that the kill finds it at work
            time.sleep(0.004)
            return write(handle, data)

        os.write = slow
        stream(wide / "base", wide / "adapter", target, shard_bytes=1_000_000)
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_killed_at_random_moments_the_merge_ends_with_the_same_files(wide: Path, tmp_path: Path):
    """Each try dies by SIGKILL, most of them inside a shard; the last goes on from what they left."""
    whole = stream(wide / "base", wide / "adapter", tmp_path / "whole/model", shard_bytes=1_000_000)
    seed = int(os.environ.get("TATARA_KILL_SEED", time.time_ns() % 10_000))
    moments, target, torn = random.Random(seed), tmp_path / "killed/model", 0
    for _ in range(int(os.environ.get("TATARA_KILLS", "6"))):
        write_until_killed(wide, target, moments.uniform(0.05, 0.6))
        torn += len(list(target.glob(".*.tmp")))
    records = {path.name.removesuffix(".ledger.json") for path in target.parent.glob("*.ledger.json")}
    times = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors") if path.name in records}
    files.remove_strays(target)
    ledger = stream(wide / "base", wide / "adapter", target, shard_bytes=1_000_000)
    assert ledger == whole, f"TATARA_KILL_SEED={seed}, {len(times)} shards were done, {torn} torn"
    assert digest_files(target) == digest_files(tmp_path / "whole/model"), f"TATARA_KILL_SEED={seed}"
    assert {path: path.stat().st_mtime_ns for path in times} == times  # kept, not made again


@pytest.mark.slow
def test_what_a_kill_left_is_cleared_or_used_before_room_is_counted(wide: Path, tmp_path: Path):
    target = tmp_path / "m/model"
    write_until_killed(wide, tmp_path / "m/model.partial", 0.5)
    stray = tmp_path / "m/model.partial/.model-00001.abc.tmp"
    stray.write_bytes(b"torn")
    subject.merge_folders(wide / "base", wide / "adapter", target, SPEC)
    assert not list(target.parent.rglob(".*.tmp")) and not target.with_name("peft").exists()
    assert files.read_json(target / subject.LEDGER)["peft"]["tensors"] == 36


def test_a_shard_cut_short_after_it_was_finished_is_made_again(wide: Path, tmp_path: Path):
    ledger = stream(wide / "base", wide / "adapter", tmp_path / "m/model", shard_bytes=1_000_000)
    torn = tmp_path / "m/model" / sorted(ledger["shards"])[1]
    with torn.open("r+b") as handle:
        handle.truncate(1000)
    assert stream(wide / "base", wide / "adapter", tmp_path / "m/model", shard_bytes=1_000_000) == ledger
    assert files.digest(torn) == ledger["shards"][torn.name]


@pytest.mark.slow
def test_two_merges_at_once_make_one_model(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    code = (
        "from pathlib import Path; from tasks.artifacts import ArtifactStore, TrainedAdapter\n"
        "from tasks.merge.run import merge_adapter; from tasks.specs import MergeSpec\n"
        f"store = ArtifactStore(Path({str(store.root)!r})); adapter = store.committed(TrainedAdapter)[0]\n"
        "print(merge_adapter(adapter, MergeSpec(shard_bytes=1_000_000), store).model_dump_json())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert first == second and json.loads(first)["num_changed"] == 4
    assert [found.model_dump(mode="json") for found in store.committed(subject.MergedModel)] == [json.loads(first)]
    assert subject.merge_adapter(adapter, SPEC, store).key == json.loads(first)["key"]


def test_room_is_looked_at_before_anything_is_written(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 10_000_000)
    with pytest.raises(CapacityError, match=r"merging needs about 0\.1 GB below .* but only 0\.0 GB are free"):
        subject.merge_folders(wide / "base", wide / "adapter", tmp_path / "out/model", SPEC)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_disk_that_fills_is_said_and_nothing_appears(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """Another writer may take the room after it was looked at; what is whole is kept, and used once there is room."""
    (tmp_path / "disk").mkdir()
    mount_tmpfs(tmp_path / "disk", "2m")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True))
    target = tmp_path / "disk/m/model"
    monkeypatch.setattr(files, "free_bytes", lambda path: 10**12)
    with pytest.raises(CapacityError, match=r"the disk filled while merging .*No space left.*finished shards are kept"):
        subject.merge_folders(wide / "base", wide / "adapter", target, SPEC)
    partial = target.with_name("model.partial")
    done = {path.name for path in partial.iterdir()}  # nothing torn
    assert not target.exists() and 0 < len(done) < 3
    assert {f"{name}.ledger.json" for name in done} == {path.name for path in target.parent.glob("*.ledger.json")}
    subprocess.run(["mount", "-o", "remount,size=40m", str(tmp_path / "disk")], check=True)
    before = {name: (partial / name).stat().st_mtime_ns for name in done}
    assert len(stream(wide / "base", wide / "adapter", partial, shard_bytes=1_000_000)["shards"]) == 3
    assert {name: (partial / name).stat().st_mtime_ns for name in done} == before


def _break(path: Path, name: str, value: float) -> None:
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("base", "model.layers.1.mlp.router.weight", r"base tensor model\.layers\.1\.mlp\.router\.weight h"),
        ("base", "model.layers.1.self_attn.q_proj.weight", r"base tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("base", "model.layers.0.mlp.experts.down_proj", r"base tensor model\.layers\.0\.mlp\.experts\.down_proj h"),
        ("adapter", "base_model.model.model.layers.0.mlp.experts.lora_B.weight", r"adapter tensor .*lora_B\.w"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, file: str, name: str, message: str, value: float):
    base = write_base(tmp_path / "base", SHAPE)
    adapter = write_adapter(
        tmp_path / "adapter", SHAPE, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    path = {"base": base / "model-00001-of-00001.safetensors", "adapter": adapter / "adapter_model.safetensors"}[file]
    _break(path, name, value)
    with pytest.raises(CorruptError, match=message):
        stream(base, adapter, tmp_path / "merged", shard_bytes=1_000_000)
    assert not list((tmp_path / "merged").iterdir())


def test_sums_that_overflow_are_named(tmp_path: Path):
    base = write_base(tmp_path / "base", SHAPE)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, size=1e19, target_modules=["q_proj"], lora_alpha=80)
    with pytest.raises(CorruptError, match=r"merging .*q_proj\.weight gives values that are not finite: the adapter's"):
        stream(base, adapter, tmp_path / "merged", shard_bytes=1_000_000)


def test_a_change_without_effect_is_named(tmp_path: Path):
    base, adapter = (
        write_base(tmp_path / "base", SHAPE),
        write_adapter(tmp_path / "a", SHAPE, target_modules=["q_proj"]),
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].zero_()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ShapeError, match=r"change of model\.layers\.1\.self_attn\.q_proj\.weight is zero"):
        stream(base, adapter, tmp_path / "merged", shard_bytes=1_000_000)


@pytest.mark.slow
def test_an_adapter_that_peft_can_not_load_stops_the_merge(tmp_path: Path):
    base = write_base(tmp_path / "base", SHAPE)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, target_modules=["q_proj"])
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", {**config, "target_modules": ["no_such_module"]})
    with pytest.raises(ServiceError, match=r"PEFT can't put this adapter on this base(.|\n)*no_such_module"):
        subject.merge_folders(base, adapter, tmp_path / "out/model", SPEC)


def test_a_base_on_another_disk_is_copied_all_the_same(tmp_path: Path, request: pytest.FixtureRequest):
    """copy_file_range does not go from one file system to another."""
    (tmp_path / "disk").mkdir()
    mount_tmpfs(tmp_path / "disk", "3m")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True))
    base = write_base(tmp_path / "base", SHAPE)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, target_modules=["q_proj"])
    here = stream(base, adapter, tmp_path / "here", shard_bytes=1_000_000)
    there = stream(base, adapter, tmp_path / "disk/there", shard_bytes=1_000_000)
    assert here == there
    assert {name: files.digest(tmp_path / "disk/there" / name) for name in there["shards"]} == here["shards"]


def test_a_large_copied_tensor_lies_in_its_blocks_as_in_the_base(tmp_path: Path):
    """Only then can a file system with reflinks share its extents."""
    shape = GptOssShape.model_validate({**SHAPE.model_dump(), "vocab_size": 40_000})
    base = write_base(tmp_path / "base", shape)
    adapter = write_adapter(tmp_path / "adapter", shape, target_modules=["q_proj"])
    stream(base, adapter, tmp_path / "merged", shard_bytes=10_000_000)
    places = []
    for path in (base / "model-00001-of-00001.safetensors", tmp_path / "merged/model.safetensors"):
        header, start = files.read_safetensors_header(path)
        places.append(start + header["model.embed_tokens.weight"]["data_offsets"][0])
    assert places[0] % output.BLOCK_BYTES == places[1] % output.BLOCK_BYTES


def test_a_base_that_changed_or_went_is_not_merged_into(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    weights = Path(adapter.base_folder) / "model.safetensors"
    os.utime(weights)  # touched, the same bytes: the digest tells
    subject.require_same_base(adapter, store)
    save_model(Path(adapter.base_folder), seed=5)
    with pytest.raises(CorruptError, match=rf"base at .*/base is not the one that adapter {adapter.short} was trained"):
        subject.merge_adapter(adapter, SPEC, store)
    weights.parent.rename(tmp_path / "moved")
    with pytest.raises(MissingError, match=r"was at .*/base and is gone: bring it back, or train again"):
        subject.merge_adapter(adapter, SPEC, store)


def test_a_base_that_was_made_again_is_not_merged_into_though_none_touched_it(tmp_path: Path):
    """A pretrained base under the same key with other bits: another machine's, or trained anew here."""
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path).model_copy(update={"base_digest": "0" * 64})
    with pytest.raises(CorruptError, match="is not the one that adapter"):
        subject.require_same_base(adapter, store)


def test_a_finished_merge_needs_no_room(made: Made, monkeypatch: pytest.MonkeyPatch):
    """Killed after the last rename: only the manifest lacks, and a full disk is no reason to refuse it."""
    store, adapter, merged = made
    (merged.path / "manifest.json").unlink()
    monkeypatch.setattr(files, "free_bytes", lambda path: 10_000_000)
    assert subject.merge_adapter(adapter, SPEC, store) == merged


def test_latest_is_the_newest_adapter_of_the_recipes_base(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    adapter = make_adapter(store, tmp_path)
    assert find_adapter("latest", BaseModelSpec(model=str(tmp_path / "base")), store) == adapter
    with pytest.raises(MissingError, match=rf"no adapter 'latest' of openai/gpt-oss-20b below .*are: {adapter.short}"):
        find_adapter("latest", BaseModelSpec(model="openai/gpt-oss-20b"), store)
    assert find_adapter(adapter.short, BaseModelSpec(model="openai/gpt-oss-20b"), store) == adapter
