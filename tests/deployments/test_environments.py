"""Environments: what is chosen, when it is redone, and what is said when it can't be made. Nothing is installed."""

import json
import os
import platform
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from deployments import environments as subject
from deployments import host
from deployments.host import SetupError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> subject.Environment:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/main.txt").write_text("nothing==1\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").touch()
    (tmp_path / "venv/lib/python3.11/site-packages").mkdir(parents=True)
    return subject.Environment(
        name="main", folder=tmp_path / "venv", lock=tmp_path / "locks/main.txt", needed_bytes=1, on_gpu=False
    )


def test_stamp_holds_until_the_lock_or_the_host_changes(environment: subject.Environment):
    assert not subject.is_whole(environment)
    subject.write_stamp(environment, 1.0)
    assert subject.is_whole(environment)
    subject.make_environment(environment)  # returns at once: it could install nothing here
    assert not subject.is_whole(replace(environment, on_gpu=True))
    environment.lock.write_text("nothing==2\n")
    assert not subject.is_whole(environment)


def test_torn_stamp_or_missing_interpreter_is_not_whole(environment: subject.Environment):
    environment.stamp.write_text('{"fingerprint": "')
    assert not subject.is_whole(environment)
    subject.write_stamp(environment, 1.0)
    environment.python.unlink()
    assert not subject.is_whole(environment)


def test_another_checkouts_environment_is_not_made_again_through_a_link(environment: subject.Environment):
    subject.write_stamp(environment, 1.0)
    link = environment.folder.with_name("linked")
    link.symlink_to(environment.folder)
    with pytest.raises(
        SetupError, match=r"linked is a symbolic link to .*venv, whose target would be emptied and made again"
    ):
        subject.make_environment(replace(environment, folder=link))
    assert subject.is_whole(environment) and not (link.parent / ".tatara").exists()


def test_missing_lock_and_unknown_name_are_named(environment: subject.Environment):
    environment.lock.unlink()
    with pytest.raises(SetupError, match=r"main\.txt is missing: restore it"):
        subject.is_whole(environment)
    with pytest.raises(SetupError, match="no environment 'gpu': choose main, vllm, weave or ppo"):
        subject.describe_environment("gpu")


def test_full_disk_and_wrong_python_are_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SetupError, match=r"\.venv needs about 1000000 GB below .* but \d+\.\d GB are free"):
        host.check_python_and_disk(tmp_path / ".venv", 10**15)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SetupError, match=r"3\.11 to 3\.14 is needed \(torch 2\.13\.0 has no wheel"):
        host.check_python_and_disk(tmp_path / ".venv", 1)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    host.check_python_and_disk(tmp_path / ".venv", 1)
    with pytest.raises(SetupError, match=r"3\.11 to 3\.12 is needed \(cuda-python"):
        host.check_python_and_disk(tmp_path / ".venv", 1, on_gpu=True)


def test_everything_that_names_a_python_names_the_same():
    oldest, newest, on_gpu = "3.11", host.NEWEST[0], host.NEWEST_ON_GPU[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={oldest},<3.{newest[1] + 1}"
    assert subject.TORCH_VERSION in host.NEWEST[1]
    for name, words in (
        ("README.md", f"Python {oldest} to 3.{newest[1]}, on a GPU host {oldest} or 3.{on_gpu[1]}"),
        ("README.ja.md", f"Python {oldest}〜3.{newest[1]}（GPU のあるホストでは {oldest} か 3.{on_gpu[1]}"),
    ):
        assert words in (ROOT / name).read_text(), name


def test_cpu_torch_comes_from_pips_wheel_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    right = tmp_path / f"torch-2.13.0+cpu-{tag}-{tag}-manylinux_2_28_{platform.machine()}.whl"
    for name in (right.name, f"torch-2.12.0+cpu-{tag}-{tag}-linux_{platform.machine()}.whl", "torch-2.13.0.tar.gz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PIP_FIND_LINKS", f"/not/there {tmp_path.as_uri()}")
    host.read_pip_settings.cache_clear()
    assert host.list_wheel_folders() == [tmp_path]
    assert host.find_cpu_torch(host.list_wheel_folders(), "2.13.0") == right
    assert host.find_cpu_torch([tmp_path], "9.9.9") is None
    host.read_pip_settings.cache_clear()


def test_uv_is_given_pips_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.invalid/simple")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    host.read_pip_settings.cache_clear()
    assert host.uv_variables()["UV_DEFAULT_INDEX"] == "https://mirror.invalid/simple"
    host.read_pip_settings.cache_clear()


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        ("error: dns error: failed to lookup address", "check the network"),
        ("error: No space left on device (os error 28)", "the disk is full"),
        ("error: Hash mismatch for `idna==3.20`", "differs from the lock file"),
        ("something else", "see the lines above"),
    ],
)
def test_failures_are_explained(says: str, hint: str):
    command = [sys.executable, "-c", f"import sys; sys.exit({says!r})"]
    with pytest.raises(SetupError, match=f"the tool failed with exit status 1: .*{hint}"):
        subject.run(command, "the tool")


def test_project_and_cpu_vllm_are_registered(environment: subject.Environment):
    subject.register_project(environment)
    subject.register_cpu_vllm(environment)
    packages = environment.folder / "lib/python3.11/site-packages"
    assert (packages / "tatara.pth").read_text() == f"{ROOT}\n"
    assert "from deployments.cli import main" in (environment.folder / "bin/tatara").read_text()
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r}); import importlib.metadata as m; print(m.version('vllm'))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0.32.0+cpu\n"


def test_script_runs_on_a_bare_interpreter(tmp_path: Path):
    command = [sys.executable, "-I", "-S", str(ROOT / "deployments/environments.py"), "moon"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert (result.returncode, result.stderr) == (
        1,
        "error: there is no environment 'moon': choose main, vllm, weave or ppo\n",
    )


def test_locks_name_every_package_with_a_hash_and_no_index():
    for lock in sorted((ROOT / "locks").glob("*.txt")):
        lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
        pins = [line for line in lines if not line.startswith(" ")]
        assert all("==" in pin and pin.endswith("\\") for pin in pins), lock.name
        assert all(line.strip().startswith("--hash=sha256:") for line in lines if line.startswith(" ")), lock.name
        assert "://" not in lock.read_text(), lock.name


def test_stamp_says_what_was_made(environment: subject.Environment):
    subject.write_stamp(environment, 12.34)
    assert json.loads(environment.stamp.read_text())["lock"] == "main.txt"
