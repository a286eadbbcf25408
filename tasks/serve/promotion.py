"""A new model beside the old one: started, given a share, then all requests; or taken away again.

    start_candidate() -> verify it on its own port -> shift_traffic() -> retire()
                                  any failure before the last share      -> roll_back()

What serves is what the traffic file names first (traffic.py). It changes hands in one rename, in shift_traffic: a
process that is killed before leaves the old model serving, one that is killed after it the new one. What it
leaves in the other slot is found by its identity file and ended by the next start, promotion or stop.

Ring: edge.  Units: seconds.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tasks import files, processes
from tasks.errors import CapacityError, PromotionError, ServiceError, SpecError
from tasks.serve import services
from tasks.serve.canary import counts_since, judge
from tasks.serve.fingerprints import fingerprint_model
from tasks.serve.preflight import check_memory, check_model, check_ports, check_room_beside
from tasks.serve.settings import ServiceSettings
from tasks.serve.traffic import (
    Share,
    gateway_says,
    read_shares,
    share_of,
    wait_until_followed,
    write_traffic,
)
from tasks.specs import PromoteSpec, ServeSpec

LEASE_S = 15.0  # a canary whose promoter was killed ends after it
_POLL_S = 0.5
logger = logging.getLogger(__name__)


def choose_strategy(settings: ServiceSettings, spec: PromoteSpec) -> tuple[str, str]:
    """Return "blue_green" or "replace", and why.

    Raises: CapacityError when blue_green was asked for and both do not fit, SpecError when the new model has
        another name than the one that clients ask for.
    """
    if spec.strategy == "replace":
        return "replace", "asked for"
    now = services.follow(settings)
    running = processes.find_alive(now.identity_file(now.slot))
    if running is None or not gateway_says(now):
        return "replace", "nothing is served, so there is nothing to keep"
    if running.note.get("fingerprint") == fingerprint_model(settings) and running.note.get("model") == settings.model:
        return "replace", "it is served already"
    name = ServeSpec.model_validate_json(running.note["spec"]).served_model_name
    if name != settings.spec.served_model_name:
        raise SpecError(
            f"clients ask for {name!r}, the new model is called {settings.spec.served_model_name!r}: give it the old "
            "name (serve.served_model_name), or promote with strategy replace"
        )
    try:
        return "blue_green", check_room_beside(replace(settings, slot=now.other_slot))
    except CapacityError as error:
        if spec.strategy == "blue_green":
            raise
        return "replace", str(error)


def start_candidate(settings: ServiceSettings) -> ServiceSettings:
    """Start the new vLLM in the slot that does not serve; return its settings. The old one and the gateway go on.

    Raises: PortTakenError, MissingError or TransientError (another promotion runs) before anything starts;
        ServiceError when it dies or does not answer.
    """
    with files.lock_file(settings.folder / "lock"):
        now = services.follow(settings)
        candidate = replace(settings, slot=now.other_slot)
        check_model(candidate)
        check_ports(candidate, ("vllm",))
        services.end_candidate(now)
        check_memory(candidate)
        services.ensure(candidate, services.plan_vllm(candidate), services.wait_for_vllm)
    logger.info("%s waits in %s, on port %d", candidate.model, candidate.slot, candidate.vllm_port)
    return candidate


def shift_traffic(candidate: ServiceSettings, spec: PromoteSpec, show: Callable[[str], None] = logger.info) -> None:
    """Give the candidate a share, then all requests; on any trouble before that, take it away again.

    Raises: PromotionError with figures when it did worse than the old model, ServiceError when it or the gateway
        is gone.
    """
    now = services.follow(candidate)
    old = next(iter(read_shares(candidate.folder)), None) or share_of(now)
    try:
        if spec.canary_share:
            show(_watch_canary(candidate, old, spec))
        generation = write_traffic(candidate, [share_of(candidate)])  # from here on the new model serves
    except BaseException as error:  # also a cancelled flow
        said = roll_back(candidate.home)
        logger.warning("%s was not promoted (%s); %s", candidate.model, type(error).__name__, said)
        raise
    wait_until_followed(candidate, generation)


def _watch_canary(candidate: ServiceSettings, old: Share, spec: PromoteSpec) -> str:
    """Return what was counted when the new model may have all. Raises PromotionError when it did worse."""
    shares = [replace(old, weight=1.0 - spec.canary_share), share_of(candidate, spec.canary_share)]
    if shares[0].weight == shares[1].weight:  # servers of equal weight share by load: a canary must not
        shares[1] = share_of(candidate, spec.canary_share * 1.001)
    before = _counts(candidate)
    wait_until_followed(candidate, write_traffic(candidate, shares, time.time() + LEASE_S))
    began = renewed = time.monotonic()
    while True:
        if processes.find_alive(candidate.identity_file(candidate.slot)) is None:
            raise ServiceError(f"the new vLLM died as a canary; the end of its log:\n{_tail(candidate)}")
        after = _counts(candidate)
        new, was = (counts_since(before.get(slot, {}), after.get(slot, {})) for slot in (candidate.slot, old.slot))
        verdict = judge(new, was, time.monotonic() - began, spec)
        if verdict == "pass":
            return (
                f"{new.answered} of {new.total} requests were answered, in {new.mean_s:.3f} s on the mean; by the old "
                f"model {was.answered} of {was.total}, in {was.mean_s:.3f} s"
            )
        if verdict != "wait":
            raise PromotionError(f"the new model does worse than the one that serves: {verdict}. It was taken away")
        if time.monotonic() - renewed > LEASE_S / 3:
            write_traffic(candidate, shares, time.time() + LEASE_S)
            renewed = time.monotonic()
        time.sleep(_POLL_S)


def _counts(settings: ServiceSettings) -> dict[str, dict[str, float]]:
    return {each["name"]: each for each in gateway_says(settings).get("upstreams", [])}


def retire(settings: ServiceSettings, spec: PromoteSpec) -> str:
    """Wait until the model that served before has answered what it had, then stop it; return what was done."""
    now = services.follow(settings)
    deadline = time.monotonic() + spec.drain_s
    while left := int(_counts(now).get(now.other_slot, {}).get("in_flight", 0)):
        if time.monotonic() > deadline:
            logger.warning("%d answers of the old model still run after %g s: they are cut", left, spec.drain_s)
            break
        time.sleep(_POLL_S)
    with files.lock_file(settings.folder / "lock"):
        ended = services.end_candidate(now)
    settings.vacancy.unlink(missing_ok=True)
    return "the old model was stopped after its last answer" if ended else "no other model ran any more"


def roll_back(home: Path) -> str:
    """Give all requests to the model that serves and stop the one beside it; return what was done."""
    settings = services.follow(ServiceSettings(model="", home=home))
    shares = read_shares(settings.folder)
    if len(shares) > 1:
        write_traffic(settings, [replace(shares[0], weight=1.0)])
    beside = processes.find_alive(settings.identity_file(settings.other_slot))
    if beside is None:
        return "nothing waited beside the model that serves"
    with files.lock_file(settings.folder / "lock"):
        services.end(settings, settings.other_slot)
    return f"{beside.note.get('model', 'the new model')} was stopped, the model that serves goes on"


def begin_trial(home: Path, model: str) -> None:
    """Note that `model` takes the place of what serves before it has passed everything."""
    files.write_json(_trial(home), {"model": model})


def end_trial(home: Path) -> str:
    """Return the model that is on trial in the place of the old one, empty for none, and forget it."""
    if not _trial(home).exists():
        return ""
    model = files.read_json(_trial(home))["model"]
    _trial(home).unlink()
    return model


def _trial(home: Path) -> Path:
    return ServiceSettings(model="", home=home).folder / "trial.json"


def _tail(settings: ServiceSettings) -> str:
    return processes.last_lines(settings.log(settings.slot))
