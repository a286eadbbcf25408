"""Start vLLM and the gateway for a published model, or find them serving it already.

Ring: edge.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, Claim, MergedModel, PublishedModel, ServedModel, TrainedAdapter, make_key
from tasks.errors import MissingError, SpecError
from tasks.serve import promotion, services, trial
from tasks.serve.command import reach
from tasks.serve.settings import ServiceSettings, service_settings
from tasks.serve.weights import locate_model, require_merged_files
from tasks.specs import Recipe, ServeSpec

VERSION = 1
ANONYMOUS = HfApi(token=False)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and for whom a model is served.

    Args:
        host: HOST and TATARA_VLLM_PYTHON of the machine, when they differ from the recipe's.
        run_id: of the flow run that serves; in the headers of the gateway's answers and in its traces.
        hub: fetches the published commit when the local folder is gone.
    """

    host: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""
    hub: HfApi = ANONYMOUS


HERE = Place()


def serve_model(published: PublishedModel, spec: ServeSpec, store: ArtifactStore, place: Place = HERE) -> ServedModel:
    """Serve the published model; always runs, since the answer depends on the world.

    Args:
        published: what is served, from its local folder.
        spec: ports, name, lengths.
        store: its root holds the services' records and logs.
        place: the machine and the run.
    Raises: CorruptError when the published files are not the merged ones, PortTakenError, CapacityError or
        MissingError, all before anything starts; ServiceError with the last lines of the log when a service dies
        or does not answer in time.
    """
    published, settings = prepare(published, spec, store, place)
    with _claim(published, settings.spec, store) as claim:
        status = services.start(settings)
        urls = {"vllm_url": status.vllm.url, "gateway_url": status.gateway.url}
        served = _served(claim, published, settings.spec, **urls, reused=status.reused)
        return claim.commit(served, spec=settings.spec)


def start_candidate(
    published: PublishedModel, recipe: Recipe, store: ArtifactStore, place: Place = HERE
) -> ServedModel:
    """Start the published model beside the one that serves, where memory holds both; else in its place.

    The arguments are those of serve_model; of the recipe `serve` and `promote` count. The answer's `candidate_slot`
    is empty when it serves already. Raises as serve_model does, and CapacityError when both were asked for and do
    not fit.
    """
    published, settings = prepare(published, recipe.serve, store, place)
    trial.require_no_other(settings)
    strategy, why = promotion.choose_strategy(settings, recipe.promote)
    logger.info("strategy %s: %s", strategy, why)
    if strategy == "replace":
        trial.begin(settings)
        return serve_model(published, recipe.serve, store, place)
    with _claim(published, settings.spec, store) as claim:
        candidate = promotion.start_candidate(settings)
        url = f"http://{reach(candidate.spec.host)}:{candidate.vllm_port}"
        served = _served(claim, published, settings.spec, vllm_url=url, gateway_url=url, reused=False)
        return claim.commit(served.model_copy(update={"candidate_slot": candidate.slot}), spec=settings.spec)


def shift_traffic(
    candidate: ServedModel,
    recipe: Recipe,
    store: ArtifactStore,
    place: Place = HERE,
    show: Callable[[str], None] = logger.info,
) -> ServedModel:
    """Give a candidate its share of the requests, then all; return it as what serves. Nothing to do for what does."""
    if not candidate.candidate_slot:
        return candidate
    published = store.ancestor(candidate, PublishedModel)
    settings = service_settings(candidate.model_folder, recipe.serve, store.root, place.host)
    settings = replace(settings, ids=_ids(published, store, place.run_id), slot=candidate.candidate_slot)
    promotion.shift_traffic(settings, recipe.promote, show)
    status = services.status(settings)
    with _claim(published, settings.spec, store) as claim:
        urls = {"vllm_url": status.vllm.url, "gateway_url": status.gateway.url}
        served = _served(claim, published, settings.spec, **urls, reused=False)
        served = served.model_copy(update={"model_folder": candidate.model_folder})
        return claim.commit(served, spec=settings.spec)


def retire_others(served: ServedModel, recipe: Recipe, store: ArtifactStore, place: Place = HERE) -> str:
    """Stop the model that served before once its last answers have ended; return what was done."""
    return promotion.retire(service_settings(served.model_folder, recipe.serve, store.root, place.host), recipe.promote)


def find_published(name: str, store: ArtifactStore) -> PublishedModel:
    """Return the published model whose key or digest begins with `name`; `latest`: the newest.

    Raises: MissingError that lists what there is, SpecError when several fit.
    """
    every = store.committed(PublishedModel)
    found = every[-1:] if name == "latest" else [p for p in every if p.key.startswith(name) or p.repo_id == name]
    if not found or not name:
        there = ", ".join(f"{p.short} ({p.repo_id})" for p in every) or "none"
        raise MissingError(f"no published model {name!r} below {store.root}: there are {there}")
    if len(found) > 1:
        raise SpecError(f"{name!r} may be {', '.join(p.short for p in found)}: give more digits of the key")
    return found[0]


def prepare(
    published: PublishedModel, spec: ServeSpec, store: ArtifactStore, place: Place
) -> tuple[PublishedModel, ServiceSettings]:
    """Return the model with a folder that is the merged one, byte for byte, and the settings to serve it."""
    published = locate_model(published, place.hub)
    require_merged_files(published, store)
    settings = service_settings(published.model_folder, spec, store.root, place.host)
    return published, replace(settings, ids=_ids(published, store, place.run_id))


def _claim(
    published: PublishedModel, spec: ServeSpec, store: ArtifactStore
) -> AbstractContextManager[Claim[ServedModel]]:
    return store.claim(ServedModel, make_key("serve", VERSION, spec, {"time": str(time.time_ns())}, (published,)))


def _served(
    claim: Claim[ServedModel],
    published: PublishedModel,
    spec: ServeSpec,
    *,
    vllm_url: str,
    gateway_url: str,
    reused: bool,
) -> ServedModel:
    return ServedModel(
        key=claim.key,
        folder=str(claim.folder),
        parents=(published.ref,),
        model_folder=published.model_folder,
        model_digest=published.model_digest,
        served_model_name=spec.served_model_name,
        dtype="bfloat16" if spec.dtype == "auto" else spec.dtype,
        vllm_url=vllm_url,
        gateway_url=gateway_url,
        reused=reused,
    )


def _ids(published: PublishedModel, store: ArtifactStore, run_id: str) -> dict[str, str]:
    """Return what the gateway's answers lead back to; an ancestor that was cleared away is left out."""
    ids = {"TATARA_MODEL_DIGEST": published.model_digest, "TATARA_RUN_ID": run_id}
    refs = list(published.parents)
    while refs:
        try:
            artifact = store.load(refs.pop())
        except MissingError:
            continue
        if isinstance(artifact, MergedModel):
            refs += artifact.parents
        elif isinstance(artifact, TrainedAdapter):
            ids["TATARA_ADAPTER_DIGEST"] = artifact.adapter_digest
    return {name: value for name, value in ids.items() if value}
