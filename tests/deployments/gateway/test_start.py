"""The start of the gateway: what it loads, and what it says when it can't."""

import subprocess
import sys


def test_it_starts_in_time_without_prefect_and_torch(clean_environment, tmp_path):
    code = (
        "import sys, deployments.gateway.__main__, deployments.gateway.app;"
        "heavy = {'prefect', 'torch', 'transformers', 'vllm', 'wandb', 'weave', 'redis', 'httpx'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = clean_environment()
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_wrong_settings_and_a_taken_port_end_with_one_clear_line(gateway, clean_environment, tmp_path, unused_port):
    def run(**settings):
        own = {"FILE_QUEUE_PATH": tmp_path / "t.jsonl", "LITE_GATEWAY_PORT": unused_port}
        environment = clean_environment(**(own | settings))
        argv = [sys.executable, "-m", "deployments.gateway"]
        result = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        return result.stderr

    assert "LITE_PROMPT_MAX_LEN='many'" in run(LITE_PROMPT_MAX_LEN="many")
    assert f"127.0.0.1:{gateway.port} (Address already in use)" in run(LITE_GATEWAY_PORT=gateway.port)
    assert "FILE_QUEUE_PATH='/proc/x/t.jsonl' can't be written" in run(FILE_QUEUE_PATH="/proc/x/t.jsonl")
