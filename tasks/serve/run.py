"""Start vLLM and the gateway for a published model, or find them serving it already.

Ring: edge.
"""

import os
import time

from tasks.artifacts import ArtifactStore, PublishedModel, ServedModel, make_key
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import ServeSpec

VERSION = 1


def serve_model(published: PublishedModel, spec: ServeSpec, store: ArtifactStore) -> ServedModel:
    """Serve the published model; always runs, since the answer depends on the world.

    Raises: PortTakenError, CapacityError or MissingError before anything starts; ServiceError with
        the last lines of the log when a service dies or does not answer in time.
    """
    settings = ServiceSettings(
        model=published.model_folder, spec=spec, home=store.root, variables=os.environ, vllm_url=""
    )
    status = services.start(settings)
    key = make_key("serve", VERSION, spec, {"time": str(time.time_ns())}, (published,))
    with store.claim(ServedModel, key) as claim:
        served = ServedModel(
            key=key,
            folder=str(claim.folder),
            parents=(published.ref,),
            model_folder=published.model_folder,
            model_digest=published.model_digest,
            served_model_name=spec.served_model_name,
            dtype="float32" if spec.dtype == "float32" else "bfloat16",
            vllm_url=status.vllm.url,
            gateway_url=status.gateway.url,
            reused=status.reused,
        )
        return claim.commit(served, spec=spec)
