from pathlib import Path

import pytest

from deployments.gateway.settings import Settings, Weighted, base_url, is_loopback, settings_table
from tasks.errors import SpecError


def test_the_defaults_are_the_seeds():
    settings = Settings.from_environment({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8001)
    assert settings.vllm_url == (Weighted("http://localhost:8000"),)
    assert (settings.lite_max_chars, settings.queue_path) == (120, Path("llm_traces.jsonl"))
    assert (settings.fallback, settings.redis_url) == (True, "")


def test_each_variable_is_read_and_an_empty_one_counts_as_unset():
    environment = {"LITE_GATEWAY_PORT": "9", "FALLBACK_ON_VLLM_DOWN": "False", "REDIS_URL": " ", "LITE_CANNED": "1"}
    settings = Settings.from_environment(environment)
    assert (settings.port, settings.fallback, settings.redis_url, settings.lite_canned) == (9, False, "", True)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LITE_GATEWAY_PORT", "80801", "expected a whole number 1..65535"),
        ("LITE_PROMPT_MAX_LEN", "-1", "expected a whole number"),
        ("FALLBACK_ON_VLLM_DOWN", "maybe", "expected true or false"),
        ("VLLM_URL", "localhost:8000", "expected an URL like"),
        ("VLLM_URL", "http://a=0,http://b", "weight above 0"),
        ("VLLM_URL", "http://a=many", "weight above 0"),
        ("TATARA_RUN_ID", "a\nb", "printable"),
        ("VLLM_URL", "http://user:key@host/v1", "without user and password"),
        ("GATEWAY_READ_TIMEOUT_S", "nan", "expected seconds"),
        ("GATEWAY_LOG_LEVEL", "loud", "expected one of"),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(name, value, expected):
    with pytest.raises(SpecError, match=expected) as error:
        Settings.from_environment({name: value})
    assert f"{name}={value!r}" in str(error.value)


def test_all_faults_are_said_at_once_and_secrets_are_not_shown():
    with pytest.raises(SpecError) as error:
        Settings.from_environment({"LITE_GATEWAY_PORT": "x", "REDIS_URL": "http://:hunter2@host"})
    assert "LITE_GATEWAY_PORT='x'" in str(error.value)
    assert "REDIS_URL=(not shown)" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in repr(Settings(vllm_api_key="hunter2", redis_url="redis://:hunter2@h"))


def test_base_url_keeps_a_prefix_and_drops_the_route():
    assert base_url("http://h:1/v1/chat/completions") == "http://h:1"
    assert base_url("http://h:1/v1") == "http://h:1"
    assert base_url("https://h/team/v1/") == "https://h/team"


def test_every_setting_is_in_the_table_once():
    names = [row.split("`")[1] for row in settings_table().splitlines()[2:]]
    assert len(names) == len(set(names)) == 39


def test_several_servers_with_weights():
    settings = Settings.from_environment({"VLLM_URL": "http://a:8000/v1/chat/completions=95, https://b=5"})
    assert settings.vllm_url == (Weighted("http://a:8000", 95.0), Weighted("https://b", 5.0))


def test_nobody_serves_the_world_without_keys_by_accident(tmp_path):
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(SpecError, match=r"GATEWAY_KEYS_FILE is not set.*GATEWAY_ALLOW_UNAUTHENTICATED=true"):
            Settings.from_environment({"LITE_GATEWAY_HOST": host}).check_exposure()
    for extra in ({"GATEWAY_ALLOW_UNAUTHENTICATED": "true"}, {"GATEWAY_KEYS_FILE": str(tmp_path / "keys")}):
        Settings.from_environment({"LITE_GATEWAY_HOST": "0.0.0.0"} | extra).check_exposure()
    published = {"LITE_GATEWAY_HOST": "0.0.0.0", "GATEWAY_PUBLISHED_HOST": "127.0.0.1"}
    Settings.from_environment(published).check_exposure()
    Settings().check_exposure()
    assert [is_loopback(host) for host in ("127.9.9.9", "::1", "localhost", "0.0.0.0")] == [True, True, True, False]
