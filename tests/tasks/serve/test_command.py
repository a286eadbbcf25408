"""The argv and environment of both services, by value."""

import os
from pathlib import Path

import pytest

from tasks.serve.command import chat_url, gateway_command, reach, vllm_command
from tasks.serve.settings import service_settings
from tasks.specs import ServeSpec


def test_cpu_command_says_host_and_cache_size():
    spec = ServeSpec(cpu_kv_cache_bytes=64 << 20, extra_args=("--seed", "7"))
    argv, variables = vllm_command(spec, "/models/a", on_gpu=False, python="/e/bin/python", scratch="/s", cache="/c")
    text = " ".join(argv)
    assert text.startswith("/e/bin/python -P -m vllm.entrypoints.cli.main serve /models/a --host 127.0.0.1 --port 8000")
    assert "--kv-cache-memory-bytes 67108864 --enforce-eager --distributed-executor-backend uni --seed 7" in text
    assert "--gpu-memory-utilization" not in argv
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert (variables["TMPDIR"], variables["VLLM_CACHE_ROOT"]) == ("/s/temporary", "/c")


def test_gpu_command_has_the_seeds_knobs():
    argv, variables = vllm_command(ServeSpec(), "owner/name", on_gpu=True, python="p", scratch="/s", cache="/c")
    text = " ".join(argv)
    for part in ("--served-model-name gpt-oss-20b", "--max-model-len 8192", "--gpu-memory-utilization 0.85"):
        assert part in text
    assert "--enforce-eager" not in argv
    assert "HF_HUB_OFFLINE" not in variables  # a Hub id may be downloaded


def test_gateway_gets_the_seeds_variables_and_nothing_else():
    given = {
        "FILE_QUEUE_PATH": "q.jsonl",
        "LITE_PROMPT_MAX_LEN": "9",
        "FALLBACK_ON_VLLM_DOWN": "false",
        "HF_TOKEN": "t",
    }
    argv, variables = gateway_command(
        ServeSpec(gateway_port=9001), python="p", vllm_url=chat_url(ServeSpec()), variables=given
    )
    assert argv == ["p", "-m", "deployments.gateway"]
    assert variables == {
        "VLLM_URL": "http://127.0.0.1:8000/v1/chat/completions",
        "LITE_GATEWAY_PORT": "9001",
        "LITE_GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_SHUTDOWN_S": "15",
        "FILE_QUEUE_PATH": "q.jsonl",
        "LITE_PROMPT_MAX_LEN": "9",
        "FALLBACK_ON_VLLM_DOWN": "false",
    }


def test_bound_to_all_is_reached_by_loopback():
    assert [reach(host) for host in ("0.0.0.0", "127.0.0.1", "::1")] == ["127.0.0.1", "127.0.0.1", "[::1]"]


def test_the_cache_lies_in_an_environment_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    settings = service_settings("/m", ServeSpec(), tmp_path / "home", {"TATARA_VLLM_PYTHON": str(python)})
    assert settings.cache == settings.scratch / "cache"  # no environment: someone's own interpreter
    (tmp_path / "env/pyvenv.cfg").touch()
    assert settings.cache == tmp_path / "env/cache"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert settings.cache == settings.scratch / "cache"
