"""compose.yaml and the systemd units: what they hand on, who may write the queue, what is bound where."""

import configparser
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.gateway.settings import Settings
from deployments.gateway.trace_settings import TraceSettings
from deployments.services import _SPEC_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deployments/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
UNITS = sorted((ROOT / "deployments/systemd").glob("*.service"))


class _Repeating(dict[str, str]):
    """systemd takes a key several times; configparser would keep the last."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, [*self[key], *value] if isinstance(value, list) and key in self else value)


def _unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, dict_type=_Repeating, delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # keys are case-sensitive
    parser.read(ROOT / "deployments/systemd" / f"{name}.service")
    return parser


def _variables(unit: configparser.RawConfigParser) -> dict[str, str]:
    pairs = (word.partition("=") for word in unit["Service"]["Environment"].split())
    return {name: value for name, _, value in pairs}


def test_every_setting_of_the_gateway_is_handed_on():
    given = SERVICES["gateway"]["environment"]
    inside = {"LITE_GATEWAY_HOST", "LITE_GATEWAY_PORT"}  # the image's; the port is published under the outer name
    of_direct = {"WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"}
    known = {field.metadata["env"] for field in (*fields(Settings), *fields(TraceSettings))}
    assert known | of_direct == given.keys() | inside
    forwarded = {name for name, value in given.items() if value is None}
    assert {"LITE_MODEL", "LITE_API_KEY", "GATEWAY_LOG_LEVEL", "LITE_PROMPT_MAX_LEN", "VLLM_API_KEY"} <= forwarded
    assert SERVICES["vllm"]["environment"]["VLLM_API_KEY"] is None


def test_redis_can_be_drained_from_this_machine_only():
    assert SERVICES["redis"]["ports"] == ["127.0.0.1:${REDIS_PORT:-6379}:6379"]
    assert SERVICES["gateway"]["environment"]["REDIS_URL"] == "redis://:${REDIS_PASSWORD:-}@redis:6379/0"
    assert "--requirepass" in SERVICES["redis"]["command"]
    docs = (ROOT / "docs/deploy.md").read_text()
    assert "REDIS_URL=redis://127.0.0.1:6379/0 .venv/bin/tatara up" in docs


def test_an_empty_password_is_none_for_the_client():
    import redis

    assert redis.Redis.from_url("redis://:@redis:6379/0").connection_pool.connection_kwargs.get("password") in (
        None,
        "",
    )


def test_ports_are_published_on_loopback_unless_told_otherwise():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(re.match(r"\$\{HOST:-127\.0\.0\.1\}:|127\.0\.0\.1:", port) for port in ports)


def test_services_wait_are_watched_and_come_back():
    assert all({"healthcheck", "restart", "stop_grace_period"} <= SERVICES[name].keys() for name in ("vllm", "redis"))
    assert SERVICES["gateway"]["depends_on"] == {
        "vllm": {"condition": "service_healthy"},
        "redis": {"condition": "service_healthy"},
    }
    known = {"MODEL", "MODEL_DIR", "HF_TOKEN", "REDIS_PASSWORD", "REDIS_PORT", "GATEWAY_SHUTDOWN_S", *_SPEC_VARIABLES}
    text = "".join(line for line in (ROOT / "deployments/compose.yaml").read_text().splitlines() if line[:1] != "#")
    assert set(re.findall(r"\$\{(\w+)", text)) <= known  # the same names as the services command's


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_starts_what_exists_as_an_unprivileged_user(path: Path):
    service = _unit(path.stem)["Service"]
    assert service["User"] == "tatara" and service["NoNewPrivileges"] == "yes" and service["ProtectSystem"] == "strict"
    module = re.search(r"-m (deployments[\w.]+)", service["ExecStart"])
    if module:
        place = ROOT / module[1].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
    else:
        assert "prefect worker start --pool ${WORK_POOL} --type process" in service["ExecStart"]


def test_queue_is_one_for_gateway_and_worker_and_writable_for_both():
    for name in ("tatara-gateway", "tatara-worker"):
        unit = _unit(name)
        queue = Path(_variables(unit)["FILE_QUEUE_PATH"])
        assert queue == Path("/var/lib/tatara-gateway/llm_traces.jsonl")
        assert queue.parent.name in unit["Service"]["StateDirectory"].split()


def test_worker_may_write_all_that_it_is_pointed_at():
    unit = _unit("tatara-worker")
    writable = [Path("/var/lib") / name for name in unit["Service"]["StateDirectory"].split()]
    variables = _variables(unit)
    for name in ("TATARA_HOME", "HOME", "FILE_QUEUE_PATH"):
        assert any(Path(variables[name]).is_relative_to(folder) for folder in writable), name
