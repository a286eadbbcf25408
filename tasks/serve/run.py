"""Start vLLM and the gateway for a published model, or find them serving it already.

Ring: edge.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel, ServedModel, TrainedAdapter, make_key
from tasks.errors import MissingError
from tasks.serve import services
from tasks.serve.settings import NO_OVERRIDES, service_settings
from tasks.serve.weights import locate_model, require_merged_files
from tasks.specs import ServeSpec

VERSION = 1
ANONYMOUS = HfApi(token=False)


def serve_model(
    published: PublishedModel,
    spec: ServeSpec,
    store: ArtifactStore,
    host: Mapping[str, str] = NO_OVERRIDES,
    run_id: str = "",
    hub: HfApi = ANONYMOUS,
) -> ServedModel:
    """Serve the published model; always runs, since the answer depends on the world.

    Args:
        published: what is served, from its local folder.
        spec: ports, name, lengths.
        store: its root holds the services' records and logs.
        host: HOST and TATARA_VLLM_PYTHON of the machine, when they differ from the recipe's.
        run_id: of the flow run that serves; in the headers of the gateway's answers and in its traces.
        hub: fetches the published commit when the local folder is gone.
    Raises: CorruptError when the published files are not the merged ones, PortTakenError, CapacityError or
        MissingError, all before anything starts; ServiceError with the last lines of the log when a service dies
        or does not answer in time.
    """
    published = locate_model(published, hub)
    require_merged_files(published, store)
    settings = service_settings(published.model_folder, spec, store.root, host)
    settings = replace(settings, ids=_ids(published, store, run_id))
    spec = settings.spec
    key = make_key("serve", VERSION, spec, {"time": str(time.time_ns())}, (published,))
    with store.claim(ServedModel, key) as claim:
        status = services.start(settings)
        served = ServedModel(
            key=key,
            folder=str(claim.folder),
            parents=(published.ref,),
            model_folder=published.model_folder,
            model_digest=published.model_digest,
            served_model_name=spec.served_model_name,
            dtype="bfloat16" if spec.dtype == "auto" else spec.dtype,
            vllm_url=status.vllm.url,
            gateway_url=status.gateway.url,
            reused=status.reused,
        )
        return claim.commit(served, spec=spec)


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
