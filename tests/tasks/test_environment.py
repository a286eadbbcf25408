"""What a child, a log line or a manifest may not see."""

import traceback

import pytest

from tasks.environment import hide_secrets, is_secret_option, without_secrets
from tasks.errors import SpecError, TransientError
from tasks.trainer_job import Terms, _environment


def test_secrets_and_foreign_settings_stay_out():
    given = {
        "HOME": "/root",
        "TOKENIZERS_PARALLELISM": "false",
        "https_proxy": "http://u:p@proxy:1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "x",
        "GITHUB_TOKEN": "x",
        "MY_API_KEY": "x",
        "DB_PASSWORD": "x",
        "DATABASE": "pg://u:p@h/d",
        "WANDB_PROJECT": "p",
        "PREFECT_API_URL": "u",
        "PYTHONPATH": "/x",
        "VIRTUAL_ENV": "/x",
        "REDIS_URL": "redis://u:p@h",
    }
    kept = {"HOME", "TOKENIZERS_PARALLELISM", "https_proxy", "CUDA_VISIBLE_DEVICES"}
    assert set(without_secrets(given)) == kept
    assert set(without_secrets(given, keep=("REDIS_",))) == kept | {"REDIS_URL"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HUGGING_FACE_HUB_TOKEN", "hf_x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("PREFECT_API_AUTH_STRING", "admin:x"),
        ("OPENAI_API_KEY", "sk-x"),
        ("DATABASE_URL", "postgres://u:p@h/d"),
        ("CACHE", "redis://:p@h"),
        ("SENTRY", "https://key@sentry.example/1"),
        ("PIP_INDEX_URL", "https://token@index.example/simple"),
        ("ODBC", "Server=h;Password=x"),
        ("PGPASSWORD", "x"),
        ("MYSQL_PWD", "x"),
        ("GITHUB_PAT", "x"),
        ("SLACK_WEBHOOK_URL", "https://hooks.example/x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/x.json"),
        ("SSH_AUTH_SOCK", "/run/x"),
    ],
)
def test_secret_stays_here(name: str, value: str):
    assert without_secrets({name: value, "HOME": "/root"}) == {"HOME": "/root"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/work"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("NCCL_SOCKET_IFNAME", "eth0"),
        ("HF_ENDPOINT", "https://hub.example/path@x"),
        ("XAUTHORITY", "/x"),
        ("KEYBOARD", "jp"),
        ("LD_LIBRARY_PATH", "/a:/b"),
    ],
)
def test_setting_passes(name: str, value: str):
    assert without_secrets({name: value}) == {name: value}


def test_keys_on_a_command_line_are_hidden():
    words = ["/m", "--api-key", "one", "two", "--api_key=three", "--hf-token", "four", "--api-server-count", "2"]
    shown = ["/m", "--api-key", "***", "***", "--api_key=***", "--hf-token", "***", "--api-server-count", "2"]
    assert hide_secrets(words) == shown
    assert is_secret_option("--api-k")  # argparse takes what an option begins with


def test_trainer_sees_no_secret_but_the_path_to_our_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p@h/d")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    variables = _environment(Terms())
    assert not {"AWS_SECRET_ACCESS_KEY", "DATABASE_URL"} & variables.keys()
    assert variables["PYTHONPATH"].split(":")[1:] == ["/mine"] and variables["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize(
    ("given", "num_processes", "seen"), [(None, 1, "0"), ("2,3", 1, "2"), ("2,3", 2, "2,3"), (None, 2, None)]
)
def test_one_process_sees_one_gpu(
    monkeypatch: pytest.MonkeyPatch, given: str | None, num_processes: int, seen: str | None
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert _environment(Terms(num_processes=num_processes)).get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize("key", ["sk-very-secret\n", "sk-very\n-secret", "sk-very-secret\u200b"])
def test_no_error_shows_a_key_that_came_with_a_line_break(monkeypatch: pytest.MonkeyPatch, free_port: int, key: str):
    """A secret that an editor ended with a line, say: http.client's own error shows it whole."""
    from tasks.evaluate.endpoint import EndpointModel
    from tasks.verify.client import get_json

    monkeypatch.setenv("VLLM_API_KEY", key)
    url = f"http://127.0.0.1:{free_port}"
    for call in (lambda: EndpointModel(url, "m", 5.0).score([1], [[2]]), lambda: get_json(f"{url}/health", 5.0)):
        with pytest.raises(
            (TransientError, SpecError), match=r"does not answer|VLLM_API_KEY holds a line break"
        ) as error:
            call()
        shown = "".join(traceback.format_exception(error.value))
        assert "very" not in shown


def test_the_hubs_token_is_sent_without_its_line_end(monkeypatch: pytest.MonkeyPatch):
    from blocks.opening import open_hub

    monkeypatch.setenv("HF_TOKEN", "hf_x\n")
    assert open_hub("").token == "hf_x"
    monkeypatch.setenv("HF_TOKEN", "\n")
    assert open_hub("").token is False
