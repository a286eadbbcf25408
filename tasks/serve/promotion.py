"""A new model beside the old one: started, given a share, then all requests; or taken away again.

    start_candidate() -> verify it on its own port -> shift_traffic() -> retire()
                                  any failure before the last share      -> roll_back(), of this run's own only

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
from typing import Any

from tasks import files, processes
from tasks.errors import CapacityError, PromotionError, ServiceError, SpecError, TransientError
from tasks.serve import handover, services
from tasks.serve.asking import get_json
from tasks.serve.canary import NO_COUNTS, counts_since, judge
from tasks.serve.command import reach
from tasks.serve.fingerprints import fingerprint_model
from tasks.serve.looking import is_alive, read_state, this_process
from tasks.serve.preflight import check_memory, check_model, check_ports, check_room_beside
from tasks.serve.settings import RUN_ID, ServiceSettings
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
        another name than the one that clients ask for, TransientError when what serves does not answer now: a model
        that may only be slow is not stopped unasked.
    """
    if spec.strategy == "replace":
        return "replace", "asked for"
    now = services.follow(settings)
    running = processes.find_alive(now.identity_file(now.slot))
    if running is None or read_state(now, now.slot).get("state") == "waiting":  # dead, or dying again and again
        return "replace", "nothing is served, so there is nothing to keep"
    if running.note.get("fingerprint") == fingerprint_model(settings) and running.note.get("model") == settings.model:
        return "replace", "it is served already"
    _require_gateway(now)
    known = running.note.get("spec")  # none: its record was lost, and with it the name
    name = ServeSpec.model_validate_json(known).served_model_name if known else settings.spec.served_model_name
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


def _require_gateway(now: ServiceSettings) -> None:
    """Raise unless the old model answers and the gateway can be told to share its requests."""
    way_out = (
        "look at `tatara services status`; `tatara services restart` brings it back, strategy replace does without"
    )
    if get_json(f"http://{reach(now.spec.host)}:{now.vllm_port}/health")[0] != 200:
        raise TransientError(f"{now.slot} runs but does not answer on port {now.vllm_port}: {way_out}")
    said = gateway_says(now)
    if not said:
        raise TransientError(f"the gateway does not answer on port {now.spec.gateway_port}: {way_out}")
    if "generation" not in said:
        raise ServiceError(f"the gateway follows no {now.upstreams_file}, an older version started it: {way_out}")


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

    With all of them it is at once what to go back to: a run that is killed or fails from then on, of whatever, must
    not bring the old model back unasked.
    Raises: PromotionError with figures when it did worse than the old model or nobody asked it anything,
        ServiceError when it or the gateway is gone.
    """
    now = services.follow(candidate)
    old = next(iter(read_shares(candidate.folder)), None) or share_of(now)
    try:
        _require_candidate(candidate)
        if spec.canary_share:
            show(_watch_canary(candidate, old, spec))
        _require_candidate(candidate)
        generation = write_traffic(candidate, [share_of(candidate)])  # from here on the new model serves
    except BaseException as error:  # also a cancelled flow
        said = roll_back(candidate.home, candidate.ids.get(RUN_ID, ""))
        logger.warning("%s was not promoted (%s); %s", candidate.model, type(error).__name__, said)
        raise
    handover.remember_verified(candidate.home, candidate.model)
    wait_until_followed(candidate, generation)


def _require_candidate(candidate: ServiceSettings) -> None:
    """Raise ServiceError unless the vLLM that was verified waits in the slot, never died, and answers.

    Hours may lie between: an evaluation, a person's approval.
    """
    _require_alive(candidate)
    running = processes.find_alive(candidate.identity_file(candidate.slot))
    note = running.note if running else {}
    wanted = {"model": candidate.model, "run": candidate.ids.get(RUN_ID, "")}
    if any(note.get(name) != value for name, value in wanted.items()):
        found = f"{note.get('model') or 'an unknown model'} of run {note.get('run') or '(none)'}"
        raise ServiceError(
            f"{candidate.slot} runs {found}, not {candidate.model}, which was verified: somebody started another one "
            "there; promote again"
        )
    if note.get("fingerprint") != fingerprint_model(candidate):
        raise ServiceError(f"the files of {candidate.model} changed since it was verified: publish and promote again")
    url = f"http://{reach(candidate.spec.host)}:{candidate.vllm_port}/health"
    if get_json(url)[0] != 200:
        raise ServiceError(f"the new vLLM does not answer at {url}; the end of its log:\n{_tail(candidate)}")


def _require_alive(candidate: ServiceSettings) -> None:
    """Raise ServiceError when the new vLLM died, also when its supervisor started it again."""
    is_there = processes.find_alive(candidate.identity_file(candidate.slot)) is not None
    if not is_there or read_state(candidate, candidate.slot).get("restarts"):
        raise ServiceError(f"the new vLLM died as a canary; the end of its log:\n{_tail(candidate)}")


def _watch_canary(candidate: ServiceSettings, old: Share, spec: PromoteSpec) -> str:
    """Return what was counted when the new model may have all. Raises PromotionError when it may not."""
    shares = [replace(old, weight=1.0 - spec.canary_share), share_of(candidate, spec.canary_share)]
    if shares[0].weight == shares[1].weight:  # servers of equal weight share by load: a canary must not
        shares[1] = share_of(candidate, spec.canary_share * 1.001)
    last, new, was = _counts(candidate), NO_COUNTS, NO_COUNTS
    wait_until_followed(candidate, write_traffic(candidate, shares, time.time() + LEASE_S))
    began = renewed = time.monotonic()
    while True:
        _require_alive(candidate)
        now = _counts(candidate)  # may lack one, or both: the gateway is slow, or starts again
        new += counts_since(last.get(candidate.slot, {}), now.get(candidate.slot, {}))
        was += counts_since(last.get(old.slot, {}), now.get(old.slot, {}))
        last |= now
        verdict = judge(new, was, time.monotonic() - began, spec)
        if verdict == "pass":
            return (
                f"{new.answered} of {new.total} requests were answered, in {new.mean_s:.3f} s on the mean; by the old "
                f"model {was.answered} of {was.total}, in {was.mean_s:.3f} s"
            )
        if verdict != "wait":
            raise PromotionError(f"the new model may not have all requests: {verdict}. It was taken away")
        if time.monotonic() - renewed > LEASE_S / 3:
            write_traffic(candidate, shares, time.time() + LEASE_S)
            renewed = time.monotonic()
        time.sleep(_POLL_S)


def _counts(settings: ServiceSettings) -> dict[str, dict[str, Any]]:  # Any: an entry of /health's upstreams
    return {each["name"]: each for each in gateway_says(settings).get("upstreams", [])}


def retire(settings: ServiceSettings, spec: PromoteSpec) -> str:
    """Wait until the model that served before has answered what it had, then stop it; return what was done."""
    now = services.follow(settings)
    deadline = time.monotonic() + spec.drain_s
    while left := _in_flight(now):
        if time.monotonic() > deadline:
            logger.warning("%s answers of the old model still run after %g s: they are cut", left, spec.drain_s)
            break
        time.sleep(_POLL_S)
    with files.lock_file(settings.folder / "lock"):
        ended = services.end_candidate(now)
    settings.vacancy.unlink(missing_ok=True)
    return "the old model was stopped after its last answer" if ended else "no other model ran any more"


def _in_flight(now: ServiceSettings) -> int | str:
    """Return how many answers the old model still gives; "unknown" when a gateway that lives does not say."""
    if said := gateway_says(now):
        counts = {each["name"]: each for each in said.get("upstreams", [])}
        return int(counts.get(now.other_slot, {}).get("in_flight", 0))
    return "unknown" if processes.find_alive(now.identity_file("gateway")) else 0


def roll_back(home: Path, run: str) -> str:
    """Give all requests to the model that serves and stop what this run has beside it; return what was done.

    Another run's candidate, and its old model that still answers, are left alone: a promotion that fails at its first
    step must not end the one that it collided with.

    Args:
        home: the store's root.
        run: id of the flow run that gives up, as its model's ids name it.
    """
    settings = services.follow(ServiceSettings(model="", home=home))
    _give_back(settings, run)
    serving, beside = (
        processes.find_alive(settings.identity_file(slot)) for slot in (settings.slot, settings.other_slot)
    )
    if beside is None:
        return "nothing waited beside the model that serves"
    has_replaced = serving is not None and serving.note.get("run") == run and not _is_promoted(beside)
    if beside.note.get("run", "") != run and not has_replaced:
        return f"{beside.note.get('model', 'what runs beside')} is another run's: left alone"
    with files.lock_file(settings.folder / "lock"):
        services.end(settings, settings.other_slot)
    return f"{beside.note.get('model', 'the new model')} was stopped, the model that serves goes on"


def _is_promoted(beside: processes.Identity) -> bool:
    """Say whether another process that lives promotes it."""
    promoter = beside.note.get("promoter", "")
    return promoter != this_process() and is_alive(promoter)


def _give_back(settings: ServiceSettings, run: str) -> None:
    """Take this run's share of the requests away; where the disk is full its lease is waited for instead."""
    shares = read_shares(settings.folder)
    if len(shares) < 2 or shares[1].ids.get(RUN_ID, "") != run:
        return
    try:
        write_traffic(settings, [replace(shares[0], weight=1.0)])
    except OSError as error:
        logger.warning("can't write %s (%s): the canary ends by itself", settings.upstreams_file, error)
        time.sleep(LEASE_S + 1.0)  # then the gateway sends it nothing any more, and it may be stopped


def _tail(settings: ServiceSettings) -> str:
    return processes.last_lines(settings.log(settings.slot))
