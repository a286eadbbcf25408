"""Tasks of lm-eval, run by its own command line in its own environment.

    "lm_eval:<task>" -> python -m lm_eval ... -> results_*.json -> Metric

Of an endpoint `local-completions` is asked, model files are opened by `hf`. TATARA_LM_EVAL_PYTHON names the
Python that has lm_eval, TATARA_LM_EVAL_TASKS a folder with task files of your own.

Ring: edge.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import files
from tasks.children import run_child
from tasks.environment import read_secret, without_secrets
from tasks.errors import CorruptError, MissingError, ServiceError
from tasks.evaluate.results import Metric
from tasks.processes import last_lines

PYTHON, TASKS = "TATARA_LM_EVAL_PYTHON", "TATARA_LM_EVAL_TASKS"
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bleu", "mcc")  # the first that a task has; more is better
_TIMEOUT_S = 6 * 3600.0


def require(plugins: tuple[str, ...], variables: Mapping[str, str] = os.environ) -> None:
    """Raise MissingError before anything is measured when a plug-in can't run."""
    python = variables.get(PYTHON, "")
    if plugins and not Path(python).is_file():
        raise MissingError(
            f"EvaluateSpec.plugins = {', '.join(plugins)} needs {PYTHON}, the Python of an environment with lm_eval "
            f"(it is {python or 'not set'}): python3 -m venv lm-eval && lm-eval/bin/pip install 'lm_eval[api]'"
        )


def endpoint_arguments(url: str, model: str, folder: Path) -> list[str]:
    """Return lm_eval's words for a served model; its own copy of the tokenizer makes the tokens."""
    values = (
        f"model={model},base_url={url.rstrip('/')}/v1/completions,tokenizer={folder},num_concurrent=4,max_retries=3"
    )
    return ["--model", "local-completions", "--model_args", values]


def files_arguments(folder: Path, dtype: str, device: str) -> list[str]:
    """Return lm_eval's words for a model folder."""
    return ["--model", "hf", "--model_args", f"pretrained={folder},dtype={dtype}", "--device", device]


def run(plugin: str, model: list[str], out: Path, variables: Mapping[str, str] = os.environ) -> Metric:
    """Run one plug-in in the folder `out`; return its first metric. Raises ServiceError with its last lines."""
    task = plugin.partition(":")[2]
    argv = [variables[PYTHON], "-m", "lm_eval", *model, "--tasks", task, "--output_path", str(out), "--batch_size", "1"]
    if own := variables.get(TASKS):
        argv += ["--include_path", own]
    env = {**without_secrets(variables, keep=("VLLM_API_KEY",)), "TOKENIZERS_PARALLELISM": "false"}
    if key := read_secret(env, "VLLM_API_KEY"):
        env["OPENAI_API_KEY"] = key  # where local-completions looks for it
    out.mkdir(parents=True, exist_ok=True)
    log = out / "output.log"
    code = run_child(argv, env, log, folder=out, timeout_s=_TIMEOUT_S)
    if code:
        raise ServiceError(f"{plugin} ended with code {code}; its last lines:\n{last_lines(log)}")
    found = sorted(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CorruptError(f"{plugin} left no results_*.json below {out}; its last lines:\n{last_lines(log)}")
    return read_metric(files.read_json(found[-1]), task)


def read_metric(report: dict[str, Any], task: str) -> Metric:  # Any: JSON values
    """Return the metric of a task from lm_eval's report.

    >>> read_metric({"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1}}}, "t")
    Metric(value=0.5, stderr=0.1)
    """
    values = report.get("results", {}).get(task, {})
    for metric in _METRICS:
        for name, value in values.items():
            if name.partition(",")[0] == metric and isinstance(value, (int, float)):
                stderr = values.get(name.replace(metric, f"{metric}_stderr", 1))
                return Metric(value=float(value), stderr=float(stderr) if isinstance(stderr, (int, float)) else 0.0)
    shown = ", ".join(values) or "nothing"
    raise CorruptError(f"lm_eval reported {shown} for {task}, expected one of {', '.join(_METRICS)}")
