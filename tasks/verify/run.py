"""Ask the live endpoint, compare with the merged files and with the base, write the report.

Ring: edge.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks import files, machine
from tasks.artifacts import (
    ArtifactStore,
    HealthReport,
    MergedModel,
    PackedDataset,
    ServedModel,
    TrainedAdapter,
    make_key,
)
from tasks.environment import without_secrets
from tasks.errors import AttestationError, ServiceError
from tasks.processes import last_lines
from tasks.specs import VerifySpec
from tasks.verify.client import get_json, post_json, stream_chat, text_of
from tasks.verify.probes import Scores, answer_logprobs, check_scores, compare, scoring_request

VERSION = 2
ShowFn = Callable[[HealthReport, dict[str, Any]], None]  # Any: JSON values
_ROOT = Path(__file__).resolve().parents[2]


def verify_model(served: ServedModel, spec: VerifySpec, store: ArtifactStore, show: ShowFn) -> HealthReport:
    """Probe the served model through the gateway; commit a report whether it passed or not.

    Args:
        served: the live endpoint; its parents lead to the merged model, the base and the data.
        spec: what it has to show.
        store: where those artifacts are.
        show: called with the report and what stands beside it, passed or failed.
    Raises: AttestationError when the served model is not the merged one or no better than its base;
        ServiceError or TransientError when the endpoint is not healthy.
    """
    key = make_key("verify", VERSION, spec, {"time": str(time.time_ns())}, (served,))
    with store.claim(HealthReport, key) as claim:
        scores, about = probe(served, spec, store)
        failure = _failure(scores, spec)
        about["failure"] = str(failure) if failure else ""
        report = HealthReport(
            key=key,
            folder=str(claim.folder),
            parents=(served.ref,),
            passed=failure is None,
            served_logprob=scores.served,
            merged_logprob=scores.merged,
            base_logprob=scores.base,
            token_gap=scores.token_gap,
            tuning_gap=scores.tuning_gap,
            num_answers=about["num_answers"],
            question=spec.question,
            answer=about["chat"]["answer"],
            gateway_url=served.gateway_url,
            served_model_name=served.served_model_name,
        )
        claim.commit(report, spec=spec, about=about)
    show(report, about)
    if failure:
        raise failure
    return report


def _failure(scores: Scores, spec: VerifySpec) -> AttestationError | None:
    try:
        check_scores(scores, spec)
    except AttestationError as error:
        return error
    return None


def probe(
    served: ServedModel, spec: VerifySpec, store: ArtifactStore
) -> tuple[Scores, dict[str, Any]]:  # Any: JSON values
    """Ask everything that is asked of the endpoint; return the scores and what stands beside them."""
    documents = pq.read_table(store.ancestor(served, PackedDataset).path / "validation_documents.parquet").to_pylist()
    documents = documents[: spec.num_answers]
    reference = reference_scores(served, documents, store)
    about = {"health": check_health(served, spec), "chat": ask(served, spec), "num_answers": len(documents)}
    served_values: list[float] = []
    for document in documents:
        prompt, answer = document["prompt_ids"], document["answer_ids"]
        body = scoring_request(served.served_model_name, prompt, answer)
        reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
        served_values.extend(answer_logprobs(reply, prompt, answer))
    return compare(served_values, reference["merged"], reference["base"]), about


def reference_scores(
    served: ServedModel,
    documents: list[dict[str, Any]],  # Any: token columns
    store: ArtifactStore,
) -> dict[str, list[float]]:
    """Return {"merged", "base"} log-probabilities of each token, computed once for the same weights and answers."""
    merged, adapter = store.ancestor(served, MergedModel), store.ancestor(served, TrainedAdapter)
    growth = 2 if served.dtype == "float32" else 1  # bf16 files opened in float32
    needed = growth * merged.total_bytes + (1 << 30)
    identity = [
        VERSION,
        merged.model_digest,
        adapter.base_digest,
        served.dtype,
        [d["row_id"] for d in documents],
        adapter.key,
    ]
    folder = store.root / "reference" / sha256(repr(identity).encode()).hexdigest()[:16]
    result = folder / "scores.json"
    with files.lock_file(folder.with_suffix(".lock"), "the reference scores"):
        if not result.exists():
            machine.require_memory(needed, "scoring with transformers", "verify on a machine with more memory")
            job = {
                "folders": {"merged": merged.model_folder, "base": adapter.base_folder},
                "documents": documents,
                "dtype": served.dtype,
                "result": str(result),
            }
            files.write_json(folder / "job.json", job)
            _run_reference(folder)
        return files.read_json(result)


def _run_reference(folder: Path) -> None:
    log = folder / "output.log"
    env = without_secrets(os.environ)
    env.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(_ROOT))
    with log.open("wb") as output:
        argv = [sys.executable, "-m", "tasks.verify.reference", str(folder / "job.json")]
        code = subprocess.run(argv, env=env, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise ServiceError(f"scoring with transformers ended with code {code}; its last lines:\n{last_lines(log)}")


def check_health(served: ServedModel, spec: VerifySpec) -> dict[str, Any]:  # Any: JSON values
    """Return what both services say of themselves. Raises ServiceError when one is not well."""
    health = get_json(f"{served.gateway_url}/health", spec.request_timeout_s)
    if health.get("gateway") != "ok" or health.get("vllm") is not True:
        raise ServiceError(f"the gateway at {served.gateway_url} says {health}, expected gateway ok and vllm true")
    names = [model["id"] for model in get_json(f"{served.gateway_url}/v1/models", spec.request_timeout_s)["data"]]
    if served.served_model_name not in names:
        raise ServiceError(f"{served.gateway_url} serves {', '.join(names)}, expected {served.served_model_name}")
    return health


def ask(served: ServedModel, spec: VerifySpec) -> dict[str, Any]:  # Any: JSON values
    """Ask the recipe's question, once whole and once streamed. Raises ServiceError when nothing is said."""
    url = f"{served.gateway_url}/v1/chat/completions"
    body = {
        "model": served.served_model_name,
        "messages": [{"role": "user", "content": spec.question}],
        "max_tokens": spec.max_answer_tokens,
        "temperature": 0.0,
    }
    start = time.monotonic()
    reply = post_json(url, body, spec.request_timeout_s)
    seconds = time.monotonic() - start
    if "tatara" in reply:  # the gateway marks what vLLM did not say
        raise ServiceError(f"{url} was answered by {reply['tatara']}, not by vLLM: unset LITE_CANNED and LITE_MODEL")
    pieces = [piece for piece in stream_chat(url, body, spec.request_timeout_s) if piece[1]]
    answer = text_of(reply["choices"][0]["message"])
    streamed = "".join(text for _, text in pieces)
    if not answer or not streamed:
        raise ServiceError(f"{url} answered {spec.question!r} with nothing (whole: {answer!r}, streamed: {streamed!r})")
    return {
        "question": spec.question,
        "answer": answer,
        "seconds": round(seconds, 3),
        "first_token_s": round(pieces[0][0], 3),
        "num_stream_pieces": len(pieces),
        "usage": reply.get("usage"),
    }
