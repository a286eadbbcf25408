"""Blue/green with real processes: the real gateway, and small servers in vLLM's place."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.errors import CapacityError, PromotionError, ServiceError, SpecError, TransientError
from tasks.serve import promotion, services
from tasks.serve.services import ServiceSettings
from tasks.specs import PromoteSpec
from tests.tasks.serve.stand_in import Clients, ask, beside, make_model, running
from tests.waiting import wait_for

SPEC = PromoteSpec(strategy="blue_green", canary_share=0.5, canary_requests=20, canary_s=30, drain_s=20)


def _newer(old: ServiceSettings, **mode: object) -> ServiceSettings:
    folder = make_model(Path(old.model).with_name("new"), "new", **mode)
    return replace(old, model=str(folder), ids={"TATARA_MODEL_DIGEST": "digest-new", "TATARA_RUN_ID": "r2"})


OLD, NEW = (200, "old", "digest-old"), (200, "new", "digest-new")


def test_a_good_model_takes_over_and_no_request_is_lost(old: ServiceSettings):
    new = _newer(old)
    assert promotion.choose_strategy(new, SPEC)[0] == "blue_green"
    gateway = services.status(old).gateway.pid
    said: list[str] = []
    with Clients(old) as told:
        candidate = promotion.start_candidate(new)
        assert ask(old) == OLD  # it waits beside
        assert beside(old) == "ready"
        promotion.shift_traffic(candidate, SPEC, said.append)
        promotion.retire(new, SPEC)
    assert set(told) == {OLD, NEW} and told[NEW] >= 10
    assert "requests were answered" in said[0]
    assert running(old) == {"vllm-b", "gateway"}
    now = services.status(new)
    assert (now.is_ready, now.vllm.model, now.candidate, now.gateway.pid) == (True, new.model, None, gateway)
    assert now.gateway.model == new.model  # not the one that it was started with
    assert {ask(old) for _ in range(5)} == {NEW}
    again = services.start(new)  # what serves is found where it is
    assert (again.reused, again.vllm.pid, again.gateway.pid) == (True, now.vllm.pid, gateway)
    back = promotion.start_candidate(old)  # and the next one goes to the first port
    assert back.vllm_port == old.spec.vllm_port
    assert promotion.roll_back(old.home, "r1").startswith(f"{old.model} was stopped")
    assert {ask(old) for _ in range(5)} == {NEW}
    assert services.stop(new) == ["gateway", "vllm-b"] and running(old) == set()


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ({"fails": True}, PromotionError, r"\d+ of \d+ requests failed \(100\.0 %\), of the old model 0 of \d+ "),
        ({"delay_s": 0.3}, PromotionError, r"an answer took 0\.3\d\d s on the mean of \d+, of the old model 0\.\d+ s"),
        ({"dies": True}, (ServiceError, PromotionError), r"the new vLLM died as a canary|requests failed"),
    ],
)  # fmt: skip
def test_a_worse_model_is_taken_away_by_itself(old: ServiceSettings, mode: dict, error: type, message: str):
    new = _newer(old, **mode)
    with Clients(old), pytest.raises(error, match=message):
        promotion.shift_traffic(promotion.start_candidate(new), SPEC)
    time.sleep(1.5)  # the gateway looks once a second
    assert running(old) == {"vllm", "gateway"}
    assert {ask(old) for _ in range(10)} == {OLD}
    assert services.status(old).candidate is None


def _promote_and_hang(new: ServiceSettings) -> None:
    os.setsid()
    promotion.LEASE_S = 3.0
    endless = SPEC.model_copy(update={"canary_requests": 10**6, "canary_s": 1000.0})
    promotion.shift_traffic(promotion.start_candidate(new), endless)


def test_killed_in_the_canary_the_old_model_serves_and_nothing_is_orphaned(old: ServiceSettings):
    new = _newer(old)
    promoter = multiprocessing.get_context("fork").Process(target=_promote_and_hang, args=(new,))
    promoter.start()
    with Clients(old, 1) as told:
        wait_for(lambda: told[NEW] > 3, 30)
        with pytest.raises(TransientError, match=r"a promotion \(pid \d+\) has a new model in vllm-b"):
            services.start(old)
        promoter.kill()
        promoter.join()
        assert beside(old) == "abandoned"
        time.sleep(3.0 + 1.5)
        told.clear()
        time.sleep(1.0)
        assert set(told) == {OLD}  # by itself: nobody has said anything to the gateway
        assert services.start(old).reused
    assert set(told) == {OLD} and running(old) == {"vllm", "gateway"}


def test_killed_before_the_old_one_was_stopped_the_new_model_serves(old: ServiceSettings):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), SPEC.model_copy(update={"canary_share": 0.0}))
    assert running(old) == {"vllm", "vllm-b", "gateway"}
    assert {ask(old) for _ in range(5)} == {NEW}
    assert services.start(new).reused and running(old) == {"vllm-b", "gateway"}


def test_what_does_not_fit_beside_is_said_with_numbers_before_anything_starts(old: ServiceSettings):
    new = _newer(old)
    with (Path(new.model) / "model.safetensors").open("wb") as handle:
        handle.truncate(10**13)  # sparse
    with pytest.raises(CapacityError, match=r"needs about 10001\.8 GB of memory beside the old one, [\d.]+ GB are"):
        promotion.choose_strategy(new, SPEC)
    strategy, why = promotion.choose_strategy(new, SPEC.model_copy(update={"strategy": "auto"}))
    assert strategy == "replace" and "10001.8 GB" in why
    assert running(old) == {"vllm", "gateway"}


def test_what_is_served_already_and_what_has_another_name_is_no_candidate(old: ServiceSettings):
    assert promotion.choose_strategy(old, SPEC) == ("replace", "it is served already")
    named = replace(_newer(old), spec=old.spec.model_copy(update={"served_model_name": "other"}))
    with pytest.raises(SpecError, match="clients ask for 'gpt-oss-20b', the new model is called 'other'"):
        promotion.choose_strategy(named, SPEC)
    services.stop(old)
    assert promotion.choose_strategy(named, SPEC)[0] == "replace"


def test_a_candidate_that_does_not_start_leaves_the_old_model_alone(old: ServiceSettings):
    with pytest.raises(ServiceError, match=r"vllm-b died before it was ready(.|\n)*no such architecture"):
        promotion.start_candidate(_newer(old, starts=False))
    assert running(old) == {"vllm", "gateway"} and ask(old) == OLD
