"""The whole line with real vLLM: killed in each of its steps, and sabotaged.

Slow (about three minutes): a one-layer gpt-oss with the true vocabulary, so that vLLM's harmony
path is the production one.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from flows.recipes import resolve, resolve_pretrain
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    HealthReport,
    MergedModel,
    PublishedModel,
)
from tasks.errors import AttestationError
from tasks.fetch.run import fetch_base, fetch_dataset
from tasks.gptoss.layout import config_values
from tasks.gptoss.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer
from tasks.merge.run import merge_adapter
from tasks.pack.run import pack_dataset
from tasks.serve import services
from tasks.serve.run import serve_model
from tasks.serve.settings import ServiceSettings
from tasks.specs import Recipe, change
from tasks.train.run import train_adapter
from tasks.verify.client import post_json
from tasks.verify.run import verify_model
from tests.needs import lack

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = Path(os.environ.get("TATARA_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Line:
    """Where the line runs, its recipe, and what an uninterrupted run of it makes."""

    store: ArtifactStore
    changes: dict
    recipe: Recipe
    merged_digest: str
    env: dict[str, str]


def free_ports(count: int) -> list[int]:
    import socket

    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """A small base, a recipe on it, and an uninterrupted run up to the merge in a store of its own."""
    if not VLLM_PYTHON.exists():
        lack(f"vLLM's environment is missing ({VLLM_PYTHON}): python3 deployments/environments.py vllm")
    folder = tmp_path_factory.mktemp("line")
    base = make_base_folder(folder / "base")
    vllm_port, gateway_port, prefect_port = free_ports(3)
    changes = {
        "base": {"model": str(base)},
        "train": {"max_steps": 12, "save_steps": 4, "learning_rate": 3e-2},
        "serve": {"vllm_port": vllm_port, "gateway_port": gateway_port},
        "verify": {"num_answers": 3, "min_base_margin": 0.02, "max_answer_tokens": 16},
    }
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
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        digest = run_to_merge(recipe, ArtifactStore(folder / "uninterrupted"))
        yield Line(ArtifactStore(folder / "home"), changes, recipe, digest, env)
    finally:
        services.stop(ServiceSettings(model=str(base), spec=recipe.serve, home=folder / "home"))
        server.terminate()
        server.wait(30)


def make_base_folder(folder: Path) -> Path:
    """An untrained gpt-oss of one layer with the true vocabulary and tokenizer."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_experts": 4}
    shape = resolve_pretrain("tiny").shape.model_copy(update=sizes)
    torch.manual_seed(0)
    config = GptOssConfig(**config_values(shape), bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    GptOssForCausalLM(config).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def run_to_merge(recipe: Recipe, store: ArtifactStore) -> str:
    hub = HfApi(token=False)
    base = fetch_base(recipe.base, store, hub)
    packed = pack_dataset(fetch_dataset(recipe.fetch, store, hub), base, recipe.pack, store)
    adapter = train_adapter(packed, base, recipe.train, store, lambda record: None)
    return merge_adapter(adapter, recipe.merge, store).model_digest


def start_flow(line: Line, log: Path) -> subprocess.Popen[bytes]:
    code = f"from flows.finetune import finetune; finetune('tiny', {line.changes!r})"
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=line.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )


STEPS = {  # step -> what appears when it begins to work
    "fetch": "dataset/*",
    "pack": "packed/*",
    "train": "adapter/*/metrics.jsonl",
    "merge": "merged/*",
    "publish": "published/*",
    "serve": "services/vllm.log",
    "verify": "served/*/manifest.json",
}


MAKES = {
    "fetch": "dataset",
    "pack": "packed",
    "train": "adapter",
    "merge": "merged",
    "publish": "published",
    "serve": "served",
    "verify": "health",
}


def test_killed_in_each_step_it_ends_with_the_same_verified_result(line: Line, tmp_path: Path):
    unfinished: set[str] = set()
    for step, pattern in STEPS.items():
        process = start_flow(line, tmp_path / f"{step}.log")
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if any(not path.name.startswith(".") for path in line.store.root.glob(pattern)):
                break
            time.sleep(0.0005)
        assert process.poll() is None, (tmp_path / f"{step}.log").read_text()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
        kinds = {path.parts[-3] for path in line.store.root.glob("*/*/manifest.json")}
        unfinished |= {step} if MAKES[step] not in kinds else set()
        for manifest in line.store.root.glob("*/*/manifest.json"):  # whatever is called whole is whole
            assert line.store.load(f"{manifest.parts[-3]}/{json.loads(manifest.read_text())['artifact']['key']}")
    assert unfinished >= {"pack", "train", "serve", "verify"}  # the others may be done before the signal arrives

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


def test_an_untrained_merge_is_no_better_than_the_base(line: Line):
    """Merged files that are served faithfully but hold no tune: only the comparison with the base finds it."""
    published = line.store.committed(PublishedModel)[-1]
    served = serve_model(published, line.recipe.serve, line.store)
    assert served.reused  # the same model, command and settings: nothing is started again
    demanding = line.recipe.verify.model_copy(update={"min_base_margin": 5.0})
    with pytest.raises(AttestationError, match="no better than its base"):
        verify_model(served, demanding, line.store, lambda report, about: None)


def test_a_deploy_that_serves_the_base_fails(line: Line):
    """The base under the tuned model's name, everything else as it should be."""
    published = line.store.committed(PublishedModel)[-1]
    base = line.store.ancestor(published, BaseCheckpoint)
    sabotaged = published.model_copy(update={"model_folder": base.model_folder})
    served = serve_model(sabotaged, line.recipe.serve, line.store)
    shown: list[HealthReport] = []
    with pytest.raises(AttestationError, match=r"not the merged one.*answers like the base"):
        verify_model(served, line.recipe.verify, line.store, lambda report, about: shown.append(report))
    assert [report.passed for report in shown] == [False]
    assert line.store.committed(HealthReport)[-1].passed is False
