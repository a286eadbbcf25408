"""Where vLLM can run in the trainer's process: the same Python and the same torch, or it is said why not."""

import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tasks.errors import MissingError
from tasks.reinforce.vllm_python import PACKAGES, find_engine, variables


def write_python(path: Path, told: object) -> Path:
    """An interpreter that answers with `told`."""
    path.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
    path.chmod(0o755)
    return path


def test_the_trainers_packages_stand_behind_those_of_a_vllm_with_the_same_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = write_python(tmp_path / "python", [platform.python_version(), version("torch"), "0.32.0"])
    monkeypatch.setenv("TATARA_VLLM_PYTHON", str(python))
    engine = find_engine()
    assert engine.python == str(python)
    assert any((Path(folder) / "trl").is_dir() for folder in engine.packages.split(":"))
    assert variables(engine, on_gpu=True)[PACKAGES] == engine.packages
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables(engine, on_gpu=True)


@pytest.mark.parametrize("told", [["3.9.1", version("torch"), "0.32.0"], [platform.python_version(), "2.4.0", "0.6.0"]])
def test_a_vllm_for_another_python_or_torch_is_refused(
    told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TATARA_VLLM_PYTHON", str(write_python(tmp_path / "python", told)))
    says = f"{re.escape(told[2])} at .* has Python {told[0]} and torch {re.escape(told[1])}, the trainer"
    with pytest.raises(MissingError, match=says):
        find_engine()


def test_an_interpreter_without_vllm_is_no_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TATARA_VLLM_PYTHON", sys.executable)
    with pytest.raises(MissingError, match="no vLLM beside the trainer nor at"):
        find_engine()
