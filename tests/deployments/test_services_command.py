"""The command line of the services: variables in, exit status and plain lines out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import services as subject
from tasks.errors import SpecError


def test_defaults_are_the_seeds():
    settings = subject.read_settings({})
    assert settings.model == "a1273352/gpt-oss-20b-japanese-culture"
    assert (settings.spec.host, settings.spec.vllm_port, settings.spec.gateway_port) == ("127.0.0.1", 8000, 8001)
    assert (settings.spec.served_model_name, settings.spec.max_model_len) == ("gpt-oss-20b", 8192)
    assert settings.uses_own_vllm


def test_variables_are_read_and_the_token_is_not_shown(tmp_path: Path):
    given = {
        "MODEL_DIR": "./m",
        "VLLM_PORT": "9000",
        "LITE_GATEWAY_PORT": "9001",
        "HF_TOKEN": "hf_x",
        "HOST": "0.0.0.0",
    }
    settings = subject.read_settings({**given, "TATARA_HOME": str(tmp_path), "VLLM_URL": ""})
    assert (settings.spec.vllm_port, settings.spec.gateway_port, settings.spec.host) == (9000, 9001, "0.0.0.0")
    assert (settings.hf_token, settings.home) == ("hf_x", tmp_path)
    assert "hf_x" not in repr(settings)


def test_seeds_vllm_url_means_our_own_vllm():
    url = "http://localhost:8000/v1/chat/completions"
    assert subject.read_settings({"VLLM_URL": url}).uses_own_vllm
    assert not subject.read_settings({"VLLM_URL": "http://gpu-host:8000/v1/chat/completions"}).uses_own_vllm


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VLLM_PORT": "http"}, "VLLM_PORT(.|\n)*vllm_port"),
        ({"VLLM_PORT": "8001"}, "vllm_port and gateway_port are both 8001"),
        ({"HOST": "my-laptop"}, "HOST is 'my-laptop' but an IP address"),
    ],
)
def test_wrong_variable_is_named(variables: dict[str, str], message: str):
    with pytest.raises(SpecError, match=message):
        subject.read_settings(variables)


def _call(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "TATARA_HOME": str(home), "MODEL_DIR": str(home / "none")}
    command = [sys.executable, "-m", "deployments.services", *words]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def test_exit_statuses(tmp_path: Path):
    status, start, wrong = (_call(word, home=tmp_path) for word in ("status", "start", "sing"))
    assert status.returncode == 3 and "vllm     stopped" in status.stdout
    assert start.returncode == 1 and "none does not exist" in start.stderr and "Traceback" not in start.stderr
    assert wrong.returncode == 2 and "start|stop|restart|status" in wrong.stderr


def test_import_loads_neither_prefect_nor_torch():
    code = (
        "import deployments.services, sys; print([m for m in ('prefect', 'torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_files_of_another_user_are_one_line_with_a_way_out(tmp_path: Path):
    """Of root after `sudo tatara services start`, say; as root the test becomes `nobody` after the imports."""
    home = tmp_path / "home"
    (home / "services").mkdir(parents=True)
    for command in (["-m", "deployments.services", "stop"], ["-m", "deployments.cli", "services", "stop"]):
        script = (
            "import os, sys\n"
            f"sys.argv[1:] = {command[2:]!r}\n"
            f"import {command[1]} as subject, tasks.files, tasks.serve.services\n"
            f"os.chmod({str(home / 'services')!r}, 0o555)\n"
            "if os.geteuid() == 0: os.seteuid(65534)\n"
            "sys.exit(subject.main(sys.argv[1:]))\n"
        )
        variables = {"PATH": os.environ["PATH"], "TATARA_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=False
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("error: [Errno 13] Permission denied") and "TATARA_HOME" in done.stderr
