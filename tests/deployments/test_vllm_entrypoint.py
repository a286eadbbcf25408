"""The entry point checks before it becomes vLLM, and follows a ServedModel's manifest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.vllm import entrypoint as subject
from tasks.errors import CorruptError, MissingError
from tasks.serve.settings import ServiceSettings


def _write_manifest(folder: Path, artifact: dict[str, str]) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"kind": "served", "artifact": artifact}))


def test_manifest_leads_to_the_model(tmp_path: Path):
    _write_manifest(tmp_path / "served", {"model_folder": "/models/a", "served_model_name": "ja"})
    for name in (tmp_path / "served", tmp_path / "served/manifest.json"):
        settings = subject.follow_manifest(ServiceSettings(model=str(name)))
        assert (settings.model, settings.spec.served_model_name) == ("/models/a", "ja")


def test_other_manifest_is_refused_and_model_folder_is_kept(tmp_path: Path):
    _write_manifest(tmp_path / "merged", {"digest": "x"})
    with pytest.raises(CorruptError, match=r"is no manifest of a served model \(it has \['digest'\]\)"):
        subject.follow_manifest(ServiceSettings(model=str(tmp_path / "merged")))
    (tmp_path / "merged/config.json").write_text("{}")  # a merged artifact: manifest and weights in one folder
    settings = ServiceSettings(model=str(tmp_path / "merged"))
    assert subject.follow_manifest(settings) is settings


def test_missing_model_is_said_before_anything_starts(tmp_path: Path):
    with pytest.raises(MissingError, match="nowhere does not exist"):
        subject.prepare({"MODEL_DIR": str(tmp_path / "nowhere"), "TATARA_HOME": str(tmp_path)})


def test_log_line_shows_no_key(tmp_path: Path):
    """The command is logged before exec; run for real, with an interpreter that only says that it was reached."""
    model, python = tmp_path / "model", tmp_path / "env/bin/python"
    model.mkdir()
    (model / "config.json").write_text("{}")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho reached\n")
    python.chmod(0o755)
    code = (
        "import dataclasses, sys; from deployments.vllm import entrypoint as e; prepare = e.prepare\n"
        "def with_key(variables):\n"
        "    service = prepare(variables)\n"
        "    words = ('--api-key', 'sk-1', '--seed', '7', '--api-key=sk-2')\n"
        "    return dataclasses.replace(service, argv=(*service.argv, *words))\n"
        "e.prepare = with_key; sys.exit(e.main())"
    )
    given = {"MODEL_DIR": str(model), "TATARA_HOME": str(tmp_path), "TATARA_VLLM_PYTHON": str(python)}
    env = {**os.environ, **given, "VLLM_PORT": "18765"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "reached\n", done.stderr
    assert "--api-key *** --seed 7 --api-key=***" in done.stderr and "sk-" not in done.stderr
