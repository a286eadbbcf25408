"""The whole line with real vLLM: killed in two of its steps, and sabotaged.

Slow (about two minutes): a one-layer gpt-oss with the true vocabulary, so that vLLM's harmony
path is the production one.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.recipes import resolve
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    HealthReport,
    MergedModel,
    PublishedModel,
)
from tasks.errors import AttestationError, CorruptError
from tasks.serve import services
from tasks.serve.run import serve_model
from tasks.serve.settings import ServiceSettings
from tasks.specs import Recipe, change
from tasks.verify.client import post_json
from tasks.verify.run import verify_model
from tests.flows.line import (
    ROOT,
    changes_of_tiny,
    is_made,
    make_base_folder,
    need_vllm,
    run_to_merge,
    serve_unchecked,
    wait_for_step,
)
from tests.ports import free_port
from tests.tasks.verify.sabotage import stale_tokenizer

PREFECT = (sys.executable, "-m", "prefect")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Line:
    """Where the line runs, its recipe, and what an uninterrupted run of it makes."""

    store: ArtifactStore
    changes: dict
    recipe: Recipe
    merged_digest: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, harmony_tokenizer: Path) -> Iterator[Line]:
    """A small base, a recipe on it, and an uninterrupted run up to the merge in a store of its own."""
    need_vllm()
    folder = tmp_path_factory.mktemp("line")
    base = make_base_folder(folder / "base", harmony_tokenizer)
    vllm_port, gateway_port, prefect_port = free_port(), free_port(), free_port()
    changes = changes_of_tiny(base, vllm_port, gateway_port)
    recipe = change(resolve("tiny"), changes)
    env = {
        **os.environ,
        "TATARA_HOME": str(folder / "home"),
        "FILE_QUEUE_PATH": str(folder / "traces.jsonl"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
        "PYTHONPATH": str(ROOT),
    }
    server = subprocess.Popen(
        [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port), "--no-services", "--no-ui"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        digest = run_to_merge(recipe, ArtifactStore(folder / "uninterrupted")).model_digest
        yield Line(ArtifactStore(folder / "home"), changes, recipe, digest, env)
    finally:
        services.stop(ServiceSettings(model=str(base), spec=recipe.serve, home=folder / "home"))
        server.terminate()
        server.wait(30)


def start_flow(line: Line, log: Path) -> subprocess.Popen[bytes]:
    code = f"from flows.finetune import finetune; finetune('tiny', {line.changes!r})"
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=line.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )


def test_killed_in_train_and_in_serve_it_ends_with_the_same_verified_result(line: Line, tmp_path: Path):
    """The two steps whose children outlive the flow; test_worker_kills.py kills in all seven."""
    for step in ("train", "serve"):
        log = tmp_path / f"{step}.log"
        process = start_flow(line, log)
        assert wait_for_step(line.store, step, lambda: process.poll() is None), log.read_text()[-3000:]  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_made(line.store, step)

    log = tmp_path / "last.log"
    assert start_flow(line, log).wait(timeout=400) == 0, log.read_text()[-3000:]
    report = line.store.committed(HealthReport)[-1]
    assert report.passed
    assert line.store.ancestor(report, MergedModel).model_digest == line.merged_digest
    skipped = set(re.findall(r"skipped: (\w+)/", log.read_text()))
    assert {"dataset", "packed", "adapter", "merged"} <= skipped


def test_the_served_endpoint_agrees_with_the_files_and_beats_the_base(line: Line):
    report = line.store.committed(HealthReport)[-1]
    assert abs(report.served_logprob - report.merged_logprob) < 1e-3
    assert report.served_logprob > report.base_logprob + 0.02
    assert report.answer


def ask_vllm(line: Line, path: str, body: dict) -> dict:
    url = f"http://127.0.0.1:{line.recipe.serve.vllm_port}{path}"
    return post_json(url, {"model": line.recipe.serve.served_model_name, "temperature": 0, **body}, 120)


def test_vllm_puts_the_same_prompt_before_the_model_as_training_did(line: Line):
    """The harmony path of the server renders a chat to the ids of our tokenizer's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(line.store.committed(PublishedModel)[-1].model_folder)
    chat = [{"role": "user", "content": "茶道の歴史を、できるだけ詳しく教えてください。" * 6}]
    reply = ask_vllm(line, "/v1/chat/completions", {"messages": chat, "max_tokens": 4, "return_token_ids": True})
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert reply["prompt_token_ids"] == tokenizer(prompt).input_ids


def test_served_logprobs_are_those_of_transformers_token_by_token(line: Line):
    """Long enough to leave the sliding window; several prompts in one request."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = line.store.committed(PublishedModel)[-1].model_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = ("七夕はいつ？七月七日です。", "京都の八坂神社の祭礼で、七月に行われます。" * 12)
    rows = [tokenizer(text).input_ids for text in texts]
    choices = ask_vllm(line, "/v1/completions", {"prompt": rows, "prompt_logprobs": 0, "max_tokens": 1})["choices"]
    for choice, ids in zip(choices, rows, strict=True):
        pairs = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)  # nothing precedes the first token
        theirs = torch.tensor([entry[str(token)]["logprob"] for entry, token in pairs])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (theirs - ours).abs().max().item() < 1e-3
        assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=1e-5)


@pytest.mark.chaos
def test_the_evaluation_gate_measures_vllm_and_model_files_alike(line: Line, tmp_path: Path):
    """Log-probabilities and greedy answers of real vLLM against transformers, and the tune against its base."""
    from tasks.artifacts import ServedModel
    from tasks.evaluate.kept import read_results
    from tasks.evaluate.run import evaluate_candidate, evaluate_model
    from tasks.evaluate.subjects import Subject, make_yardstick
    from tests.tasks.evaluate.conftest import write_suite

    served = line.store.committed(ServedModel)[-1]
    changes = {"questions": str(write_suite(tmp_path / "suite")), "max_answer_tokens": 6, "min_base_margin": 0.02}
    spec = change(line.recipe.evaluate, changes)
    decision = evaluate_candidate(served, spec, line.store, lambda *told: None, {})
    assert decision.promoted, decision.reasons
    yardstick = make_yardstick(served, spec, line.store)
    asked = read_results(next(e for ref in decision.parents if (e := line.store.load(ref)).kind == "evaluation"))
    opened = read_results(
        evaluate_model(Subject(model_digest="as files", folder=Path(served.model_folder)), yardstick, line.store)
    )
    assert asked.validation_loss == pytest.approx(opened.validation_loss, abs=1e-3)
    for ours, theirs in zip([*asked.questions, *asked.safety], [*opened.questions, *opened.safety], strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-3)
        assert ours.said == theirs.said, ours.id


def test_an_untrained_merge_is_no_better_than_the_base(line: Line):
    """Merged files that are served faithfully but hold no tune: only the comparison with the base finds it."""
    published = line.store.committed(PublishedModel)[-1]
    served = serve_model(published, line.recipe.serve, line.store)
    assert served.reused  # the same model, command and settings: nothing is started again
    demanding = line.recipe.verify.model_copy(update={"min_base_margin": 5.0})
    with pytest.raises(AttestationError, match="no better than its base"):
        verify_model(served, demanding, line.store, lambda report, about: None)


def attestation_of(line: Line, folder: Path) -> str:
    """Serve a folder in the published one's place, past the comparison of files; return why verify refuses it."""
    published = line.store.committed(PublishedModel)[-1]
    sabotaged = published.model_copy(update={"model_folder": str(folder)})
    with pytest.raises(CorruptError, match="is not the merged file"):
        serve_model(sabotaged, line.recipe.serve, line.store)
    served = serve_unchecked(published, folder, line.recipe.serve, line.store)
    shown: list[HealthReport] = []
    with pytest.raises(AttestationError) as caught:
        verify_model(served, line.recipe.verify, line.store, lambda report, about: shown.append(report))
    assert [report.passed for report in shown] == [False]
    assert line.store.committed(HealthReport)[-1].passed is False
    return str(caught.value)


def test_a_deploy_that_serves_the_base_fails(line: Line):
    """The base under the tuned model's name, everything else as it should be."""
    published = line.store.committed(PublishedModel)[-1]
    base = line.store.ancestor(published, BaseCheckpoint)
    said = attestation_of(line, Path(base.model_folder))
    assert "the served model is not the merged one" in said and "It answers like the base" in said


@pytest.mark.chaos
def test_a_deploy_with_a_stale_tokenizer_fails(line: Line, tmp_path: Path):
    """Token ids are scored as ever: only the reading of a text tells."""
    published = line.store.committed(PublishedModel)[-1]
    base = line.store.ancestor(published, BaseCheckpoint)
    folder = stale_tokenizer(Path(published.model_folder), Path(base.model_folder), tmp_path / "stale")
    assert "a stale tokenizer is served" in attestation_of(line, folder)
