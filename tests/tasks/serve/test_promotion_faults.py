"""What happens to a promotion in the world: two at once, kills, waits, dead servers, full disks. Real processes."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.services import read_settings
from tasks import processes
from tasks.errors import PromotionError, ServiceError, TransientError
from tasks.serve import handover, promotion, services, trial, vacancy
from tasks.serve.services import ServiceSettings
from tasks.serve.settings import RUN_ID
from tasks.serve.traffic import read_shares
from tasks.specs import PromoteSpec
from tests.needs import mount_tmpfs
from tests.tasks.serve.stand_in import Clients, ask, beside, make_model, running, set_mode
from tests.waiting import wait_for

pytestmark = pytest.mark.slow
SPEC = PromoteSpec(strategy="blue_green", canary_share=0.5, canary_requests=20, canary_s=30, drain_s=20)
AT_ONCE = SPEC.model_copy(update={"canary_share": 0.0})
OLD, NEW = (200, "old", "digest-old"), (200, "new", "digest-new")


def _newer(old: ServiceSettings, name: str = "new", run: str = "r2", **mode: object) -> ServiceSettings:
    folder = make_model(Path(old.model).with_name(name), name, **mode)
    return replace(old, model=str(folder), ids={"TATARA_MODEL_DIGEST": f"digest-{name}", RUN_ID: run})


@contextmanager
def _silent_gateway(settings: ServiceSettings) -> Iterator[None]:
    """It runs, and says nothing: busy, or swapped out."""
    gateway = processes.find_alive(settings.identity_file("gateway"))
    assert gateway
    members = processes.find_members(settings.identity_file("gateway"), gateway)
    for pid in members:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in members:
            os.kill(pid, signal.SIGCONT)


def _in_place(new: ServiceSettings) -> None:
    """Start it as start_candidate does where both do not fit."""
    trial.begin(new)
    services.start(new)


def _fork(work: object, *arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)  # pyright: ignore
    process.start()
    return process  # pyright: ignore


def _try_and_hang(new: ServiceSettings) -> None:
    os.setsid()
    _in_place(new)
    time.sleep(600)


def _promote_and_hang(new: ServiceSettings) -> None:
    os.setsid()
    endless = SPEC.model_copy(update={"canary_requests": 10**6, "canary_s": 1000.0})
    promotion.shift_traffic(promotion.start_candidate(new), endless)


def test_a_promotion_that_fails_leaves_another_ones_canary_alone(old: ServiceSettings):
    """Its hook runs whatever it failed of: a typo in the model's name will do."""
    first = _fork(_promote_and_hang, _newer(old))
    try:
        with Clients(old, 1) as told:
            wait_for(lambda: told[NEW] > 3, 30)
            with pytest.raises(TransientError, match=r"a promotion \(pid \d+\) has a new model in vllm-b"):
                promotion.start_candidate(_newer(old, "third", "r3"))
            assert promotion.roll_back(old.home, "r3").endswith("new is another run's: left alone")
            told.clear()
            wait_for(lambda: told[NEW] > 3, 30)
        assert running(old) == {"vllm", "vllm-b", "gateway"} and len(read_shares(old.folder)) == 2
    finally:
        first.kill()
        first.join()
    assert promotion.roll_back(old.home, "r2").endswith("new was stopped, the model that serves goes on")
    wait_for(lambda: {ask(old) for _ in range(10)} == {OLD})
    assert running(old) == {"vllm", "gateway"} and len(read_shares(old.folder)) == 1


def test_a_promotion_that_fails_does_not_cut_the_last_answers_of_what_another_one_retires(old: ServiceSettings):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), AT_ONCE)
    assert promotion.roll_back(old.home, "r3").endswith("old is another run's: left alone")
    assert running(old) == {"vllm", "vllm-b", "gateway"}
    assert promotion.roll_back(old.home, "r2").endswith("old was stopped, the model that serves goes on")  # its own
    assert running(old) == {"vllm-b", "gateway"} and {ask(old) for _ in range(5)} == {NEW}


def test_what_a_person_had_started_comes_back_when_its_replacement_fails(old: ServiceSettings):
    """Never verified here, so no memory of it but the trial's; before, nothing was served or an older model."""
    _in_place(_newer(old))
    assert ask(old)[1] == "new"
    said = handover.go_back(old.home, "r2", old.variables)
    assert said and said.endswith(f"; what served before it {old.model} is served again")
    wait_for(lambda: ask(old) == OLD)
    assert trial.read(old.home) is None and handover.go_back(old.home, "r2", old.variables) is None


def test_a_failed_attestation_in_a_promotion_also_brings_back_what_served_not_what_was_verified_once(
    old: ServiceSettings,
):
    handover.remember_verified(old.home, old.model)
    by_hand = _newer(old, "by-hand", "")
    services.start(by_hand)
    new = _newer(old)
    _in_place(new)
    said = handover.restore(old.home, new.model, old.variables)
    assert said.endswith(f"; what served before it {by_hand.model} is served again")
    assert ask(old)[1] == "by-hand" and handover.last_verified(old.home)["model"] == old.model


def test_a_trial_that_a_kill_left_ends_no_model_that_was_proven_since(old: ServiceSettings):
    handover.remember_verified(old.home, old.model)
    new = _newer(old)
    killed = _fork(_try_and_hang, new)
    wait_for(lambda: ask(old)[1] == "new", 30)
    with pytest.raises(TransientError, match=r"a promotion \(pid \d+\) tries .*new in front of clients"):
        trial.require_no_other(_newer(old, "third", "r3"))
    killed.kill()
    killed.join()
    trial.require_no_other(_newer(old, "fourth", "r4"))
    services.start(new)  # a finetune serves it and proves it
    handover.remember_verified(old.home, new.model)
    assert handover.go_back(old.home, "r2", old.variables) is None  # and no later promotion that fails takes it away
    assert ask(old)[1] == "new" and handover.last_verified(old.home)["model"] == new.model


def test_a_model_that_a_killed_run_left_on_trial_is_nothing_to_go_back_to(old: ServiceSettings):
    killed = _fork(_try_and_hang, _newer(old))
    wait_for(lambda: ask(old)[1] == "new", 30)
    killed.kill()
    killed.join()
    _in_place(_newer(old, "third", "r3"))
    assert ask(old)[1] == "third"
    said = handover.go_back(old.home, "r3", old.variables)
    assert said and said.endswith(f"; what served before it {old.model} is served again")


def test_promoting_what_serves_already_puts_nothing_on_trial(old: ServiceSettings):
    _in_place(old)
    assert handover.go_back(old.home, "r1", old.variables) is None and ask(old) == OLD


@pytest.mark.parametrize("content", ['{"model": ', "[]", '{"model": "/m"}'])
def test_a_torn_or_older_trial_file_is_no_trial(old: ServiceSettings, content: str):
    (old.folder / "trial.json").write_text(content)
    assert handover.go_back(old.home, "r2", old.variables) is None and ask(old) == OLD
    trial.begin(_newer(old))
    assert (found := trial.read(old.home)) and found.before["model"] == old.model


def test_without_a_request_nothing_is_known_and_nothing_is_promoted(old: ServiceSettings):
    quick = SPEC.model_copy(update={"canary_s": 1.0})
    with pytest.raises(PromotionError, match=r"it answered no request in 1 s \(the old model 0\), so nothing says"):
        promotion.shift_traffic(promotion.start_candidate(_newer(old)), quick)
    assert running(old) == {"vllm", "gateway"} and ask(old) == OLD


def test_a_candidate_that_died_while_a_person_thought_takes_nothing_over(old: ServiceSettings):
    candidate = promotion.start_candidate(_newer(old))
    marked = processes._find_marked(candidate.identity_file("vllm-b"))
    identity = processes.read_identity(candidate.identity_file("vllm-b"))
    assert identity
    (child,) = set(marked) - {identity.pid}
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: json.loads(candidate.state_file("vllm-b").read_text())["restarts"] == 1)
    with pytest.raises(ServiceError, match="the new vLLM died as a canary"):
        promotion.shift_traffic(candidate, AT_ONCE)
    assert running(old) == {"vllm", "gateway"} and ask(old) == OLD


def test_a_candidate_that_does_not_answer_takes_nothing_over(old: ServiceSettings):
    candidate = promotion.start_candidate(_newer(old))
    set_mode(candidate.model, is_ill=True)
    with pytest.raises(ServiceError, match=r"the new vLLM does not answer at http://127\.0\.0\.1:\d+/health"):
        promotion.shift_traffic(candidate, AT_ONCE)
    assert running(old) == {"vllm", "gateway"} and ask(old) == OLD


def test_another_model_in_the_slot_does_not_serve_under_the_verified_ones_name(old: ServiceSettings):
    candidate = promotion.start_candidate(_newer(old))
    services.stop(old)  # a person, while the first promotion waits for approval
    services.start(old)
    other = promotion.start_candidate(_newer(old, "third", "r3"))
    with pytest.raises(ServiceError, match=r"vllm-b runs .*third of run r3, not .*new, which was verified"):
        promotion.shift_traffic(candidate, AT_ONCE)
    assert running(old) == {"vllm", "vllm-b", "gateway"} and ask(old) == OLD  # the other promotion goes on
    (Path(other.model) / "model.safetensors").write_text("other weights, after verify")
    with pytest.raises(ServiceError, match=r"the files of .*third changed since it was verified"):
        promotion.shift_traffic(other, AT_ONCE)


def test_an_old_model_that_does_not_answer_now_is_not_stopped_unasked(old: ServiceSettings):
    new, auto = _newer(old), SPEC.model_copy(update={"strategy": "auto"})
    set_mode(old.model, is_ill=True)
    with pytest.raises(TransientError, match=r"vllm runs but does not answer on port \d+: look at `tatara services"):
        promotion.choose_strategy(new, auto)
    set_mode(old.model)
    with _silent_gateway(old), pytest.raises(TransientError, match=r"the gateway does not answer on port \d+"):
        promotion.choose_strategy(new, SPEC)
    assert promotion.choose_strategy(new, SPEC)[0] == "blue_green"
    supervisor = processes.find_alive(old.identity_file("vllm"))
    assert supervisor
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_for(lambda: running(old) == {"gateway"})
    assert promotion.choose_strategy(new, SPEC) == ("replace", "nothing is served, so there is nothing to keep")


def test_a_lost_record_of_the_old_model_is_no_reason_to_fail(old: ServiceSettings):
    (old.folder / "vllm.json").write_text('{"pid": ')
    assert promotion.choose_strategy(_newer(old), SPEC)[0] == "blue_green"


def test_what_was_promoted_is_what_to_go_back_to_even_if_the_run_fails_right_after(old: ServiceSettings, monkeypatch):
    handover.remember_verified(old.home, old.model)
    candidate = promotion.start_candidate(_newer(old))
    monkeypatch.setattr("tasks.serve.traffic.FOLLOWED_WITHIN_S", 0.5)
    with _silent_gateway(old), pytest.raises(ServiceError, match="the gateway does not follow"):
        promotion.shift_traffic(candidate, AT_ONCE)
    assert handover.last_verified(old.home)["model"] == candidate.model
    wait_for(lambda: ask(old) == NEW)


def test_on_a_full_disk_the_canary_ends_and_leaves_no_process(old: ServiceSettings, monkeypatch, tmp_path: Path):
    services.stop(old)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_tmpfs(disk, "1m")
    small = replace(old, home=disk)
    monkeypatch.setattr(promotion, "LEASE_S", 3.0)
    try:
        services.start(small)
        candidate = promotion.start_candidate(_newer(small))

        def fill(_: object = None) -> None:
            with (disk / "full").open("wb") as handle:
                while True:
                    handle.write(b"0" * 4096)
                    handle.flush()

        endless = SPEC.model_copy(update={"canary_requests": 10**6, "canary_s": 1000.0})
        with Clients(small, 1) as told:
            process = _fork(_when_it_serves, small, fill)
            with pytest.raises(OSError, match="No space left"):
                promotion.shift_traffic(candidate, endless)
            process.join()
            told.clear()
            time.sleep(1.0)
        assert set(told) == {OLD} and running(small) == {"vllm", "gateway"}
    finally:
        (disk / "full").unlink(missing_ok=True)
        services.stop(small)
        os.system(f"umount -l {disk}")


def _when_it_serves(settings: ServiceSettings, fill) -> None:
    wait_for(lambda: len(read_shares(settings.folder)) == 2)
    try:
        fill()
    except OSError:
        return


def test_retire_waits_for_a_gateway_that_does_not_say_what_it_still_has(old: ServiceSettings):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), AT_ONCE)
    with _silent_gateway(old):
        assert promotion._in_flight(services.follow(new)) == "unknown"
    assert promotion._in_flight(services.follow(new)) == 0


def test_status_says_whom_the_gateway_asks(old: ServiceSettings):
    candidate = promotion.start_candidate(_newer(old))
    assert beside(old) == "ready" and services.status(old).gateway.model == old.model
    endless = SPEC.model_copy(update={"canary_requests": 10**6, "canary_s": 3.0})
    with Clients(old, 1), ThreadPoolExecutor(1) as pool:
        done = pool.submit(promotion.shift_traffic, candidate, endless)
        wait_for(lambda: services.status(old).gateway.model == f"{old.model}, {candidate.model}")
        done.result()
    assert services.status(old).gateway.model == candidate.model


def test_restart_goes_on_with_the_promoted_model_also_when_it_died_and_its_answers_still_lead_back(
    old: ServiceSettings,
):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), AT_ONCE)
    promotion.retire(new, SPEC)
    supervisor = processes.find_alive(old.identity_file("vllm-b"))
    assert supervisor
    os.kill(supervisor.pid, signal.SIGKILL)  # or: it gave up; the gateway's own note says `old`
    wait_for(lambda: running(old) == {"gateway"})
    found = read_settings({**old.variables, "TATARA_HOME": str(old.home)}, goes_on=True)
    assert found.model == new.model
    services.restart(replace(found, vllm_python=old.vllm_python))
    assert ask(old) == NEW


def test_restart_goes_on_with_what_made_way_for_a_training(old: ServiceSettings):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), AT_ONCE)
    promotion.retire(new, SPEC)
    found = processes.find_alive(old.identity_file("vllm-b"))
    assert found
    vacancy.note(old, found)
    services.end(old, "vllm-b")
    assert read_settings({"TATARA_HOME": str(old.home)}, goes_on=True).model == new.model


def test_a_model_that_was_published_again_is_the_same_to_a_server(old: ServiceSettings):
    """The card is written anew, in the same folder: the old model must still be one to go back to."""
    handover.remember_verified(old.home, old.model)
    services.start(_newer(old))
    for name in ("README.md", "recipe.json", "loss_curve.png"):
        (Path(old.model) / name).write_text("another tag, a newer card")
    said = handover.restore(old.home, str(Path(old.model).with_name("new")), old.variables)
    assert said.endswith(f"; the last verified model {old.model} is served again")


def test_beside_is_said_until_it_is_gone(old: ServiceSettings):
    promotion.start_candidate(_newer(old))
    promotion.roll_back(old.home, "r2")
    assert beside(old) == ""
