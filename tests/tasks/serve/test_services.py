"""Pids, ports, restarts and failures, with real processes: small HTTP servers in vLLM's and the gateway's place."""

import ast
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import processes, procfs
from tasks.errors import CapacityError, MissingError, PortTakenError, ServiceError, SpecError
from tasks.serve import handover, services
from tasks.serve.fingerprints import fingerprint_gateway
from tasks.serve.ports import is_port_free
from tasks.serve.services import ServiceSettings
from tasks.serve.traffic import read_shares
from tasks.specs import ServeSpec
from tests.ports import free_port
from tests.tasks.serve.stand_in import make_model, make_python
from tests.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[ServiceSettings]:
    python = make_python(tmp_path)
    model = make_model(tmp_path / "model")
    vllm_port, gateway_port = free_port(), free_port()
    settings = ServiceSettings(
        model=str(model),
        spec=ServeSpec(vllm_port=vllm_port, gateway_port=gateway_port, start_timeout_s=20),
        home=tmp_path / "home",
        variables={"PATH": os.environ["PATH"]},
        vllm_python=python,
        gateway_python=python,
    )
    yield settings
    services.stop(settings)


def _with_mode(settings: ServiceSettings, mode: str) -> ServiceSettings:
    return replace(settings, variables={**settings.variables, "FAKE_MODE": mode})


def _marked(settings: ServiceSettings) -> list[int]:
    return [pid for name in ("vllm", "gateway") for pid in processes._find_marked(settings.identity_file(name))]


def test_start_reuse_status_stop(settings: ServiceSettings):
    first = services.start(settings)
    assert (first.vllm.state, first.gateway.state, first.is_ready, first.reused) == ("ready", "ready", True, False)
    assert os.getsid(first.vllm.pid) == first.vllm.pid  # survives the death of its starter
    began = time.perf_counter()
    second = services.start(settings)
    assert time.perf_counter() - began < 1.0
    assert (second.reused, second.vllm.pid, second.gateway.pid) == (True, first.vllm.pid, first.gateway.pid)
    assert services.stop(settings) == ["gateway", "vllm"]
    assert _marked(settings) == []
    after = services.status(settings)
    assert (after.vllm.state, after.gateway.state, after.is_ready) == ("stopped", "stopped", False)
    assert services.stop(settings) == []


def test_changed_weights_under_the_same_path_are_served_anew(settings: ServiceSettings):
    first = services.start(settings)
    (Path(settings.model) / "model.safetensors").write_bytes(b"other weights")
    second = services.start(settings)
    assert not second.reused
    assert second.vllm.pid != first.vllm.pid
    assert second.gateway.pid == first.gateway.pid  # nothing changed for it
    assert procfs.read_start_ticks(first.vllm.pid) is None


def test_other_knobs_are_served_anew(settings: ServiceSettings):
    first = services.start(settings)
    longer = replace(settings, spec=settings.spec.model_copy(update={"max_model_len": 4096}))
    second = services.start(longer)
    assert second.vllm.pid != first.vllm.pid
    assert "4096" in Path(f"/proc/{second.vllm.pid}/cmdline").read_text().split("\0")


def test_killed_supervisor_takes_vllm_with_it_and_the_next_start_brings_both(settings: ServiceSettings):
    first = services.start(settings)
    os.kill(first.vllm.pid, signal.SIGKILL)
    wait_for(lambda: not processes._find_marked(settings.identity_file("vllm")))
    assert services.status(settings).vllm.state == "stopped"
    second = services.start(settings)
    assert second.is_ready and second.vllm.pid != first.vllm.pid


@pytest.mark.parametrize("name", ["vllm", "gateway"])
def test_a_service_that_dies_is_started_again_by_itself(settings: ServiceSettings, name: str):
    first = services.start(settings)
    (child,) = set(processes._find_marked(settings.identity_file(name))) - {first.vllm.pid, first.gateway.pid}
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: getattr(services.status(settings), name).restarts == 1)
    wait_for(lambda: services.status(settings).is_ready)
    now = services.status(settings)
    assert (now.vllm.pid, now.gateway.pid) == (first.vllm.pid, first.gateway.pid)  # the supervisors'
    assert services.start(settings).reused
    services.stop(settings)
    assert _marked(settings) == []


def test_lost_or_torn_record_is_made_again_from_what_runs(settings: ServiceSettings):
    first = services.start(settings)
    (settings.folder / "vllm.json").write_text('{"pid": ')
    (settings.folder / "gateway.json").unlink()
    second = services.start(settings)
    assert (second.reused, second.vllm.pid, second.gateway.pid) == (True, first.vllm.pid, first.gateway.pid)
    assert {second.vllm.pid, second.gateway.pid} < set(_marked(settings))
    assert services.status(settings).vllm.model == settings.model  # it is written down again


def test_children_in_other_sessions_end_too(settings: ServiceSettings):
    services.start(_with_mode(settings, "child"))
    assert len(_marked(settings)) == 5  # both with their supervisors, and the child
    services.stop(settings)
    assert _marked(settings) == []


def test_stubborn_service_is_killed_after_the_grace(settings: ServiceSettings):
    now = services.start(_with_mode(settings, "stubborn"))
    began = time.perf_counter()
    assert processes.stop(settings.identity_file("vllm"), grace_s=0.5)
    assert 0.5 <= time.perf_counter() - began < 5
    assert procfs.read_start_ticks(now.vllm.pid) is None


def test_foreign_process_on_a_port_is_named_before_anything_starts(settings: ServiceSettings):
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", settings.spec.gateway_port))
        foreign.listen()
        message = rf"port {settings.spec.gateway_port} for gateway is taken by pid {os.getpid()} \(.+LITE_GATEWAY_PORT"
        with pytest.raises(PortTakenError, match=message):
            services.start(settings)
    assert _marked(settings) == []


def test_death_at_start_carries_the_log_without_the_token(settings: ServiceSettings):
    broken = replace(_with_mode(settings, "die"), hf_token="hf_verysecret", model="owner/name")
    with pytest.raises(ServiceError, match=r"vllm died before it was ready(.|\n)*cannot load <HF_TOKEN>") as caught:
        services.start(broken)
    assert "hf_verysecret" not in str(caught.value) + repr(broken)
    assert not list(settings.folder.glob("*.json"))


def test_token_reaches_vllm_for_hub_models_only(settings: ServiceSettings):
    with_token = replace(
        settings, hf_token="hf_t", variables={**settings.variables, "WANDB_API_KEY": "w", "HF_TOKEN": "hf_t"}
    )
    local, hub = services.plan_vllm(with_token), services.plan_vllm(replace(with_token, model="owner/name"))
    assert "HF_TOKEN" not in local.variables
    assert hub.variables["HF_TOKEN"] == "hf_t"
    assert "hf_t" not in "".join(hub.argv) + hub.digest + repr(hub)
    gateway = services.plan_gateway(with_token)
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & {*local.variables, *gateway.variables}
    for lite, is_needed in (("owner/small", True), ("/", False), ("http://host:1", False)):
        variables = {**with_token.variables, "LITE_MODEL": lite}
        gateway = services.plan_gateway(replace(with_token, variables=variables))
        assert (gateway.variables.get("HF_TOKEN") == "hf_t") == is_needed
        assert "hf_t" not in "".join(gateway.argv) + gateway.digest + repr(gateway)


def test_timeout_stops_what_was_started(settings: ServiceSettings):
    hanging = _with_mode(settings, "hang")
    hanging = replace(hanging, spec=settings.spec.model_copy(update={"start_timeout_s": 0.5}))
    with pytest.raises(ServiceError, match=r"vllm was not ready after 0\.5 s"):
        services.start(hanging)
    assert _marked(settings) == []


def test_another_model_name_is_refused(settings: ServiceSettings):
    with pytest.raises(ServiceError, match=r"serves \['other'\] but 'gpt-oss-20b' was asked for"):
        services.start(_with_mode(settings, "wrong-name"))
    assert _marked(settings) == []


def test_model_folder_and_environment_must_be_there(settings: ServiceSettings, tmp_path: Path):
    with pytest.raises(MissingError, match="no/such/model does not exist"):
        services.start(replace(settings, model="no/such/model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty has no config\.json"):
        services.start(replace(settings, model=str(tmp_path / "empty")))
    with pytest.raises(MissingError, match=r"environments\.py vllm"):
        services.start(replace(settings, vllm_python=tmp_path / "nowhere/bin/python"))


def test_a_restart_with_a_model_that_is_not_there_stops_nothing(settings: ServiceSettings):
    now = services.start(settings)
    with pytest.raises(MissingError, match="no/such/model does not exist"):
        services.restart(replace(settings, model="no/such/model"))
    assert services.status(settings).vllm.pid == now.vllm.pid


def test_too_large_model_is_refused_with_numbers(settings: ServiceSettings):
    with (Path(settings.model) / "model.safetensors").open("wb") as handle:
        handle.truncate(10**13)  # sparse
    with pytest.raises(CapacityError, match=r"needs about 10001\.8 GB of memory \(10000\.0 GB of weights\)"):
        services.start(settings)


def test_two_starts_at_once_make_one_service(settings: ServiceSettings):
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(services.start(settings).vllm.pid)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]


def test_vllm_elsewhere_is_not_started_here(settings: ServiceSettings):
    services.start(settings)
    remote = replace(
        settings,
        home=settings.home.parent / "other",
        spec=settings.spec.model_copy(update={"vllm_port": free_port(), "gateway_port": free_port()}),
        vllm_url=f"http://127.0.0.1:{settings.spec.vllm_port}/v1/chat/completions",
    )
    try:
        now = services.start(remote)
        assert (now.vllm.state, now.gateway.state, now.is_ready) == ("elsewhere", "ready", True)
    finally:
        services.stop(remote)


def test_the_gateway_is_told_what_it_serves_without_a_restart(settings: ServiceSettings):
    ids = {"TATARA_MODEL_DIGEST": "m1", "TATARA_ADAPTER_DIGEST": "a1", "TATARA_RUN_ID": "r1"}
    first = services.start(replace(settings, ids=ids))
    assert _told(settings) == ids
    again = services.start(replace(settings, ids={**ids, "TATARA_RUN_ID": "r2"}))
    assert again.gateway.pid == first.gateway.pid and _told(settings) == ids  # it serves what the first run put there
    services.start(settings)  # by hand, without ids: the same model
    assert _told(settings) == ids
    other = replace(_other_model(settings), ids={"TATARA_MODEL_DIGEST": "m2"})
    now = services.start(other)
    assert now.gateway.pid == first.gateway.pid and _told(settings) == {"TATARA_MODEL_DIGEST": "m2"}


def test_changed_gateway_code_or_new_packages_are_served_anew(settings: ServiceSettings, tmp_path: Path, monkeypatch):
    first = services.start(settings)
    (tmp_path / "env/tatara.json").write_text('{"fingerprint": "made anew"}')
    second = services.start(settings)
    assert second.vllm.pid != first.vllm.pid and second.gateway.pid != first.gateway.pid  # both run in it here
    monkeypatch.setattr(services, "fingerprint_gateway", lambda: "other code")
    third = services.start(settings)
    assert third.vllm.pid == second.vllm.pid and third.gateway.pid != second.gateway.pid


def _imported(root: Path, path: Path) -> set[Path]:
    """Every module of ours that a file imports, also inside its functions."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {Path(name.replace(".", "/") + ".py") for name in names}
    return {path for path in found if (root / path).is_file()}


def test_gateways_fingerprint_follows_each_of_its_files(tmp_path: Path):
    """All that the gateway, its direct drain or its lite processes may load is among what is looked at."""
    root = Path(__file__).resolve().parents[3]
    ours: set[Path] = set()
    todo = {Path("deployments/gateway/__main__.py"), Path("deployments/traces.py")}
    while todo:
        path = todo.pop()
        ours.add(path)
        todo |= _imported(root, path) - ours
    assert Path("tasks/traces/redis_stream.py") in ours  # imported by a function
    assert Path("tasks/traces/segments.py") in ours
    ours |= {path.relative_to(root) for path in (root / "deployments/lite").glob("*.py")}  # its processes
    for path in ours:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((root / path).read_bytes())
    before = fingerprint_gateway(tmp_path)
    for path in ours:
        (tmp_path / path).write_text("changed = True")
        assert fingerprint_gateway(tmp_path) != before, path
        (tmp_path / path).write_bytes((root / path).read_bytes())
    assert fingerprint_gateway(tmp_path) == before


def test_address_that_this_machine_lacks_is_no_taken_port(settings: ServiceSettings):
    elsewhere = replace(settings, spec=settings.spec.model_copy(update={"host": "192.0.2.7"}))
    with pytest.raises(SpecError, match=r"host '192\.0\.2\.7' can't be bound here \(Cannot assign.*`ip addr`"):
        services.start(elsewhere)
    with pytest.raises(SpecError, match=r"host 'no\.such\.host\.invalid' can't be bound here"):
        is_port_free("no.such.host.invalid", 8000)


def _on_gpu(settings: ServiceSettings) -> ServiceSettings:
    """The same fake, as the CUDA build that it then is."""
    folder = settings.vllm_python.parent.parent / "lib/python3.11/site-packages/vllm-0+cpu.dist-info"
    if folder.exists():
        folder.rename(folder.with_name("vllm-0.dist-info"))
    return settings


def test_gpu_is_released_by_our_vllm_only(settings: ServiceSettings):
    assert handover.release_gpu(settings.home) is None  # nothing was ever started
    on_cpu = services.start(settings)
    assert handover.release_gpu(settings.home) is None  # it holds no GPU
    assert services.status(settings).vllm.pid == on_cpu.vllm.pid
    services.stop(settings)
    now = services.start(_on_gpu(settings))
    with subprocess.Popen(["sleep", "600"]) as bystander:
        said = handover.release_gpu(settings.home)
        assert said and said.startswith(f"stopped our vLLM (pid {now.vllm.pid}, it served {settings.model}) to free")
        assert bystander.poll() is None
        bystander.kill()
    after = services.status(settings)
    assert (after.vllm.state, after.gateway.pid) == ("stopped", now.gateway.pid)
    assert handover.release_gpu(settings.home) is None
    assert services.start(settings).is_ready


def _told(settings: ServiceSettings) -> dict[str, str]:
    (share,) = read_shares(settings.folder)
    return dict(share.ids)


def test_what_made_way_for_a_run_that_fails_is_served_again(settings: ServiceSettings):
    settings = replace(_on_gpu(settings), ids={"TATARA_MODEL_DIGEST": "m1", "TATARA_RUN_ID": "r1"})
    services.start(settings)
    assert handover.serve_again(settings.home, settings.variables) is None  # nothing is missing
    handover.release_gpu(settings.home)
    said = handover.serve_again(settings.home, settings.variables)
    assert said and said.endswith("start what is to be served with `MODEL_DIR=... tatara services start`")
    services.start(settings)
    handover.remember_verified(settings.home, settings.model)
    handover.release_gpu(settings.home)
    said = handover.serve_again(settings.home, settings.variables)
    assert said and said.endswith(f"; the last verified model {settings.model} is served again")
    now = services.status(settings)
    assert now.is_ready and now.vllm.model == settings.model
    assert _told(settings) == settings.ids
    assert handover.serve_again(settings.home, settings.variables) is None
    handover.release_gpu(settings.home)
    services.stop(settings)  # a person's stop is no gap to fill
    assert handover.serve_again(settings.home, settings.variables) is None
    assert _marked(settings) == []


def _release_and_train(home: Path) -> None:
    handover.release_gpu(home)
    time.sleep(600)


def test_the_gpu_that_another_run_trains_on_is_not_taken_from_it(settings: ServiceSettings):
    """A promotion that fails meanwhile, of a typo say, has the same hook."""
    settings = _on_gpu(settings)
    services.start(settings)
    handover.remember_verified(settings.home, settings.model)
    other = multiprocessing.get_context("fork").Process(target=_release_and_train, args=(settings.home,))
    other.start()
    try:
        wait_for(lambda: settings.vacancy.exists() and services.status(settings).vllm.state == "stopped")
        assert handover.serve_again(settings.home, settings.variables) is None
    finally:
        other.kill()
        other.join()
    trainer = processes.Program(
        argv=("sleep", "600"),
        variables={"PATH": os.environ["PATH"]},
        identity_file=settings.home / "adapter/k1/process.json",
        log=settings.home / "adapter/k1/output.log",
        digest="",
    )
    processes.start_detached(trainer)  # it outlives its run
    try:
        said = handover.serve_again(settings.home, settings.variables)
        assert said and said.startswith("vLLM had made way and is not started again: adapter/k1 still trains.")
    finally:
        processes.stop(trainer.identity_file)
    said = handover.serve_again(settings.home, settings.variables)
    assert said and said.endswith(f"; the last verified model {settings.model} is served again")


def test_a_new_model_that_does_not_start_leaves_the_verified_one_to_be_served_again(settings: ServiceSettings):
    services.start(settings)
    handover.remember_verified(settings.home, settings.model)
    with pytest.raises(ServiceError, match="vllm died before it was ready"):
        services.start(_with_mode(_other_model(settings), "die"))
    said = handover.serve_again(settings.home, settings.variables)
    assert said and said.endswith(f"; the last verified model {settings.model} is served again")
    now = services.status(settings)
    assert now.is_ready and now.vllm.model == settings.model


def _other_model(settings: ServiceSettings) -> ServiceSettings:
    folder = Path(settings.model).with_name("other")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return replace(settings, model=str(folder))


def test_failed_model_is_stopped_when_none_was_verified(settings: ServiceSettings):
    services.start(settings)
    said = handover.restore(settings.home, settings.model, settings.variables)
    assert said == ("stopped gateway and vllm, which served the model that failed; no model was verified here before")
    assert _marked(settings) == []


def test_last_verified_model_is_served_again(settings: ServiceSettings):
    settings = replace(settings, ids={"TATARA_MODEL_DIGEST": "m1", "TATARA_RUN_ID": "r1"})
    good = services.start(settings)
    handover.remember_verified(settings.home, settings.model)
    bad = replace(_other_model(settings), ids={"TATARA_MODEL_DIGEST": "m2", "TATARA_RUN_ID": "r2"})
    services.start(bad)
    handover.remember_verified(settings.home, settings.model)  # it does not run: the memory stays as it is
    said = handover.restore(settings.home, bad.model, settings.variables)
    assert said.endswith(f"; the last verified model {settings.model} is served again")
    now = services.status(settings)
    assert now.is_ready and now.vllm.model == settings.model and now.vllm.pid != good.vllm.pid
    assert _told(settings) == settings.ids  # its answers lead back to what is served, and not to nothing
    assert handover.restore(settings.home, bad.model).startswith(f"left alone: vLLM serves {settings.model}")
    assert services.status(settings).vllm.pid == now.vllm.pid
    said = handover.restore(settings.home, settings.model)  # the verified one itself fails: it is not trusted again
    assert said.endswith("it had been verified before, now it is not started again")
    assert _marked(settings) == []


def test_verified_model_that_changed_is_not_started(settings: ServiceSettings):
    services.start(settings)
    handover.remember_verified(settings.home, settings.model)
    bad = _other_model(settings)
    services.start(bad)
    (Path(settings.model) / "model.safetensors").write_bytes(b"other weights")
    assert "is not whole any more: not started" in handover.restore(settings.home, bad.model, settings.variables)
    shutil.rmtree(settings.model)
    assert "did not start" in handover.restore(settings.home, bad.model, settings.variables)
    assert _marked(settings) == []
