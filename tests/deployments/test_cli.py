"""`tatara`: exit statuses, one line for an error, and what needs no server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import cli as subject
from flows.recipes import RECIPES, resolve
from tasks.specs import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_printed_as_json(name: str, capsys: pytest.CaptureFixture[str]):
    assert subject.main(["recipe", name]) == 0
    assert Recipe.model_validate(json.loads(capsys.readouterr().out)) == resolve(name)


def test_our_errors_are_one_line(capsys: pytest.CaptureFixture[str]):
    assert subject.main(["recipe", "tinny"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: there is no recipe 'tinny': choose one of tiny, ") and said.err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["dance"], ["services"], ["services", "sing"], ["recipe"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        subject.main(words)
    assert caught.value.code == 2
    assert "usage: tatara" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    """`tatara services status | grep -q ready`, as scripts ask."""
    argv = [sys.executable, "-m", "deployments.cli", "recipe", "tiny"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout and child.stderr
        child.stdout.close()
        said = child.stderr.read()
    assert (child.returncode, said) == (141, b"")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(subject._COMMANDS, "recipe", interrupted)
    assert subject.main(["recipe", "tiny"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_status_and_down_when_nothing_runs(
    capsys: pytest.CaptureFixture[str], free_port: int, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("VLLM_PORT", str(free_port))
    assert subject.main(["services", "status"]) == 3
    assert "vllm     stopped" in capsys.readouterr().out
    assert subject.main(["down"]) == 0
    assert capsys.readouterr().out == "no Prefect of ours was running\nnothing was running\n"
