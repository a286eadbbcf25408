"""Start vLLM and the gateway for a published model, or find them serving it already.

Ring: edge.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tasks.artifacts import ArtifactStore, PublishedModel, ServedModel, make_key
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import ServeSpec

VERSION = 1
NO_OVERRIDES: Mapping[str, str] = {}


def serve_model(
    published: PublishedModel, spec: ServeSpec, store: ArtifactStore, host: Mapping[str, str] = NO_OVERRIDES
) -> ServedModel:
    """Serve the published model; always runs, since the answer depends on the world.

    Args:
        published: what is served, from its local folder.
        spec: ports, name, lengths.
        store: its root holds the services' records and logs.
        host: HOST and TATARA_VLLM_PYTHON of the machine, when they differ from the recipe's.
    Raises: PortTakenError, CapacityError or MissingError before anything starts; ServiceError with
        the last lines of the log when a service dies or does not answer in time.
    """
    if host.get("HOST"):
        spec = spec.model_copy(update={"host": host["HOST"]})
    settings = ServiceSettings(model=published.model_folder, spec=spec, home=store.root, variables=os.environ)
    if host.get("TATARA_VLLM_PYTHON"):
        settings = replace(settings, vllm_python=Path(host["TATARA_VLLM_PYTHON"]))
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
