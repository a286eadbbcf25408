"""lm-eval as a plug-in: how it is called, what of its report counts, and the real one on a task of our own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import CorruptError, MissingError, ServiceError, SpecError
from tasks.evaluate import plugins as subject
from tasks.evaluate.results import Metric
from tasks.specs import EvaluateSpec, change
from tests.tasks.evaluate.completions_server import serve
from tests.tasks.evaluate.conftest import Line
from tests.tiny import byte_tokenizer

REPORT = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}}}


def test_length_normalised_accuracy_comes_first():
    report: dict[str, Any] = json.loads(json.dumps(REPORT))
    assert subject.read_metric(report, "t") == Metric(value=0.75, stderr=0.0)
    report["results"]["t"]["acc_norm_stderr,none"] = 0.05
    assert subject.read_metric(report, "t") == Metric(value=0.75, stderr=0.05)
    report["results"]["t"]["acc_norm_stderr,none"] = "N/A"  # of a single question
    assert subject.read_metric(report, "t").stderr == 0.0


@pytest.mark.parametrize("report", [{}, {"results": {"u": {}}}, {"results": {"t": {"perplexity,none": 3.0}}}])
def test_a_report_without_a_known_metric_is_refused(report: dict[str, Any]):
    with pytest.raises(
        CorruptError, match=r"lm_eval reported (nothing|perplexity,none) for t, expected one of acc_norm"
    ):
        subject.read_metric(report, "t")


def test_a_plugin_without_its_environment_is_told_before_anything_runs(tmp_path: Path):
    subject.require(())
    for variables in ({}, {subject.PYTHON: str(tmp_path / "no-python")}):
        with pytest.raises(MissingError, match=r"lm_eval:t needs TATARA_LM_EVAL_PYTHON.*pip install 'lm_eval"):
            subject.require(("lm_eval:t",), variables)


@pytest.mark.parametrize("name", ["hellaswag", "lm_eval:", "lm_eval:a b", "lighteval:x"])
def test_unknown_plugins_are_refused(name: str):
    with pytest.raises(SpecError, match="is not lm_eval:<task>"):
        change(EvaluateSpec(), {"plugins": [name]})


def test_a_tool_that_fails_is_told_with_its_last_lines(tmp_path: Path):
    tool = tmp_path / "python"
    tool.write_text("#!/bin/sh\necho no such task; exit 3\n")
    tool.chmod(0o755)
    with pytest.raises(ServiceError, match=r"lm_eval:t ended with code 3; its last lines:\n.*no such task"):
        subject.run("lm_eval:t", [], tmp_path / "out", {subject.PYTHON: str(tool)})
    tool.write_text("#!/bin/sh\n")
    with pytest.raises(CorruptError, match=r"lm_eval:t left no results_"):
        subject.run("lm_eval:t", [], tmp_path / "out", {subject.PYTHON: str(tool)})


def test_the_tool_sees_no_secrets(tmp_path: Path):
    tool = tmp_path / "python"
    tool.write_text("#!/bin/sh\nenv\nexit 3\n")
    tool.chmod(0o755)
    secret = {"HF_TOKEN": "hf-secret", "WANDB_API_KEY": "wandb-secret", "VLLM_API_KEY": "vllm-key"}
    with pytest.raises(ServiceError) as caught:
        subject.run("lm_eval:t", [], tmp_path / "out", {subject.PYTHON: str(tool), **secret})
    seen = (tmp_path / "out" / "output.log").read_text()
    assert "-secret" not in seen + str(caught.value) and "OPENAI_API_KEY=vllm-key" in seen


def _write_task(folder: Path, line: Line) -> list[dict[str, Any]]:
    rows = [
        {"question": question["question"], "choices": [question["answers"][0], *question["wrong"]], "label": 0}
        for question in map(json.loads, Path(line.spec.questions, "questions.jsonl").read_text().splitlines())
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = {
        "task": "tatara_own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / "tatara_own.yaml").write_text(json.dumps(task))  # JSON is YAML
    return rows


@pytest.mark.chaos
def test_the_real_lm_eval_gives_one_figure_for_endpoint_and_files(line: Line, tmp_path: Path):
    """Its accuracy is also that of our own arithmetic on the same prompts."""
    import torch

    if not os.environ.get(subject.PYTHON):
        pytest.skip("TATARA_LM_EVAL_PYTHON is not set: an environment with lm_eval[api] is needed")
    rows = _write_task(tmp_path / "tasks", line)
    variables = {**os.environ, subject.TASKS: str(tmp_path / "tasks"), "HF_HOME": str(tmp_path / "hf")}
    tokenizer = byte_tokenizer()
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before, ids = tokenizer(row["question"]).input_ids, tokenizer(row["question"] + choice).input_ids
            with torch.no_grad():
                table = line.tuned_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(table[i - 1, ids[i]].item() for i in range(len(before), len(ids))) / len(choice))
        right += scores.index(max(scores)) == 0
    with serve(line.tuned_model, tokenizer) as server:
        words = subject.endpoint_arguments(server.url, "tiny", line.tuned_folder)
        asked = subject.run("lm_eval:tatara_own", words, tmp_path / "endpoint", variables)
    words = subject.files_arguments(line.tuned_folder, "float32", "cpu")
    opened = subject.run("lm_eval:tatara_own", words, tmp_path / "files", variables)
    assert asked.value == opened.value == pytest.approx(right / len(rows))
    assert asked.stderr == pytest.approx(opened.stderr)
