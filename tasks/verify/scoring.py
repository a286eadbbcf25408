"""Log-probabilities and greedy answers of the same documents: of the endpoint, and of model files by transformers.

Ring: edge.
"""

import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from tasks import files, machine
from tasks.artifacts import ArtifactStore, ServedModel
from tasks.children import run_child
from tasks.environment import without_secrets
from tasks.errors import ServiceError
from tasks.processes import last_lines
from tasks.specs import VerifySpec
from tasks.verify.client import post_json
from tasks.verify.greedy import GreedyStep, greedy_request, greedy_tokens
from tasks.verify.probes import answer_logprobs, scoring_request

Json = dict[str, Any]  # Any: JSON values
_ROOT = Path(__file__).resolve().parents[2]


def endpoint_scores(served: ServedModel, documents: list[Json], spec: VerifySpec) -> list[float]:
    """Return log p of every answer token of every document, as the endpoint says."""
    values: list[float] = []
    for document in documents:
        prompt, answer = document["prompt_ids"], document["answer_ids"]
        body = scoring_request(served.served_model_name, prompt, answer)
        reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
        values.extend(answer_logprobs(reply, prompt, answer))
    return values


def endpoint_answers(
    served: ServedModel, documents: list[Json], expected: list[list[Json]], spec: VerifySpec
) -> list[tuple[list[int], list[GreedyStep]]]:
    """Return (the endpoint's greedy tokens, transformers') of the first few documents."""
    answers: list[tuple[list[int], list[GreedyStep]]] = []
    for document, steps in zip(documents, expected, strict=False):  # the first few only
        body = greedy_request(served.served_model_name, document["prompt_ids"], len(steps))
        reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
        answers.append((greedy_tokens(reply), [GreedyStep(**step) for step in steps]))
    return answers


def computed_once(identity: list[Any], job: Json, needed_bytes: int, store: ArtifactStore) -> Json:  # Any: plain values
    """Return what tasks/verify/reference.py says of `job`: once for one identity.

    Args:
        identity: what the result depends on.
        job: reference.py's, but for "result".
        needed_bytes: memory of the largest of its models.
        store: below its root the results are kept.
    Raises: CapacityError, ServiceError with the last lines of a child that failed.
    """
    folder = store.root / "reference" / sha256(repr(identity).encode()).hexdigest()[:16]
    result = folder / "scores.json"
    with files.lock_file(folder.with_suffix(".lock"), "the reference scores"):
        if not result.exists():
            machine.require_memory(needed_bytes, "scoring with transformers", "verify on a machine with more memory")
            files.write_json(folder / "job.json", {**job, "result": str(result)})
            _run_reference(folder)
        return files.read_json(result)


def _run_reference(folder: Path) -> None:
    log = folder / "output.log"
    env = without_secrets(os.environ)
    env.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(_ROOT))
    code = run_child([sys.executable, "-m", "tasks.verify.reference", str(folder / "job.json")], env, log)
    if code:
        raise ServiceError(f"scoring with transformers ended with code {code}; its last lines:\n{last_lines(log)}")
