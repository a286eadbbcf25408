"""Real vLLM on the CPU behind the real gateway, with a tiny random gpt-oss: the same numbers as transformers."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.serve import process, services
from tasks.serve.services import ServiceSettings
from tasks.specs import ServeSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ServiceSettings(model="x/y").vllm_python.exists(), reason="no .venv-vllm: `make setup`"),
    pytest.mark.timeout(600),
]
CHATS = [("七夕はいつ？", "七月七日です。"), ("祇園祭とは？", "京都の八坂神社の祭礼で、七月に行われます。" * 8)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from tasks.gptoss.tokenizer import build_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**sizes, **heads, vocab_size=201_088, max_position_embeddings=4096, eos_token_id=200_002)
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)  # sinks and biases too
    folder = tmp_path_factory.mktemp("model")
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceSettings]:
    spec = ServeSpec(
        vllm_port=_free_port(),
        gateway_port=_free_port(),
        served_model_name="tiny",
        max_model_len=2048,
        max_num_seqs=8,
        dtype="float32",
        cpu_kv_cache_bytes=64 << 20,
        start_timeout_s=300,
    )
    home = tmp_path_factory.mktemp("home")
    settings = ServiceSettings(model=str(model_folder), spec=spec, home=home)
    variables = {**settings.variables, "FILE_QUEUE_PATH": str(home / "traces.jsonl")}
    settings = replace(settings, variables=variables)
    services.start(settings)
    yield settings
    services.stop(settings)
    assert not process._find_marked(f"{settings.folder}:vllm")


def _post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_chat_through_the_gateway_is_a_harmony_chat(served: ServiceSettings, model_folder: Path):
    from transformers import AutoTokenizer

    chat = [
        {"role": "user", "content": "茶道の歴史を、できるだけ詳しく教えてください。" * 6}
    ]  # too long for the lite path
    body = {"model": "tiny", "messages": chat, "max_tokens": 4, "temperature": 0}
    direct = _post(served.spec.vllm_port, "/v1/chat/completions", {**body, "return_token_ids": True})
    template: Any = AutoTokenizer.from_pretrained(model_folder)
    prompt = template.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert direct["prompt_token_ids"] == template(prompt).input_ids
    through = _post(served.spec.gateway_port, "/v1/chat/completions", body)
    assert through["model"] == "tiny"
    assert through["usage"]["prompt_tokens"] == len(direct["prompt_token_ids"])


def test_served_logprobs_are_those_of_transformers(served: ServiceSettings, model_folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    rows = [tokenizer(tokenizer.apply_chat_template(turn, tokenize=False)).input_ids for turn in turns]
    body = {"model": "tiny", "prompt": rows, "prompt_logprobs": 0, "max_tokens": 1, "temperature": 0}
    choices = _post(served.spec.vllm_port, "/v1/completions", body)["choices"]
    for choice, ids in zip(choices, rows, strict=True):
        pairs = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)  # nothing precedes the first token
        theirs = torch.tensor([entry[str(token)]["logprob"] for entry, token in pairs])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (theirs - ours).abs().max().item() < 1e-3
        assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=1e-5)


def test_second_start_reuses_it(served: ServiceSettings):
    assert services.start(served).reused
