"""Ask the live endpoint, compare with the merged files and with the base, write the report.

Ring: edge.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks import files, machine
from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    HealthReport,
    MergedModel,
    PackedDataset,
    ServedModel,
    TrainedAdapter,
    make_key,
)
from tasks.children import run_child
from tasks.environment import without_secrets
from tasks.errors import AttestationError, ServiceError
from tasks.processes import last_lines
from tasks.specs import VerifySpec
from tasks.verify.chat import ask, check_texts
from tasks.verify.client import get_json, post_json
from tasks.verify.greedy import GreedyStep, compare_greedy, greedy_request, greedy_tokens
from tasks.verify.probes import (
    Gain,
    Scores,
    answer_logprobs,
    check_gain,
    check_scores,
    compare,
    measure_gain,
    scoring_request,
)

VERSION = 3
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
        findings, about = probe(served, spec, store)
        is_requantized = store.ancestor(served, MergedModel).experts == "mxfp4"
        failure = find_failure(findings, spec, served.dtype, is_requantized=is_requantized)
        about["failure"] = str(failure) if failure else ""
        scores = findings.scores
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
            adapter_gap=scores.adapter_gap,
            trainer_gain=findings.gain.trainer,
            num_greedy_tokens=sum(len(tokens) for tokens, _ in findings.greedy),
        )
        claim.commit(report, spec=spec, about=about)
    show(report, about)
    if failure:
        raise failure
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the endpoint showed, before anything is judged. `broken` is a broken contract of chat or tokenizer."""

    scores: Scores
    gain: Gain
    greedy: list[tuple[list[int], list[GreedyStep]]]
    broken: AttestationError | None


def find_failure(
    findings: Findings, spec: VerifySpec, dtype: str, *, is_requantized: bool = False
) -> AttestationError | None:
    """Return the first thing that the endpoint does not prove: weights first, then what follows from them."""
    try:
        check_scores(findings.scores, spec, dtype, is_requantized=is_requantized)
        check_gain(findings.gain, spec)
        for served, expected in findings.greedy:
            compare_greedy(served, expected, dtype)
    except AttestationError as error:
        return error
    return findings.broken


def probe(
    served: ServedModel, spec: VerifySpec, store: ArtifactStore
) -> tuple[Findings, dict[str, Any]]:  # Any: JSON values
    """Ask everything that is asked of the endpoint; return what it showed and what stands beside it."""
    packed, adapter = store.ancestor(served, PackedDataset), store.ancestor(served, TrainedAdapter)
    documents = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()[: spec.num_answers]
    reference = reference_scores(served, documents, spec, store)
    about = {"health": check_health(served, spec), "num_answers": len(documents)}
    about["chat"], broken = ask(served, spec, Path(store.ancestor(served, MergedModel).model_folder))
    broken = check_texts(served, spec, Path(store.ancestor(served, MergedModel).model_folder)) or broken
    values: list[float] = []
    for document in documents:
        prompt, answer = document["prompt_ids"], document["answer_ids"]
        body = scoring_request(served.served_model_name, prompt, answer)
        reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
        values.extend(answer_logprobs(reply, prompt, answer))
    gain = measure_gain(
        values,
        reference["base"],
        [len(document["answer_ids"]) for document in documents],
        trainer=adapter.validation_loss_before - adapter.validation_loss_after,
        num_documents=packed.num_validation_documents,
    )
    findings = Findings(
        scores=compare(values, reference["merged"], reference["base"], reference["tuned"]),
        gain=gain,
        greedy=_answer_greedily(served, documents, reference["greedy"], spec),
        broken=broken,
    )
    about["gain"] = {"trainer": gain.trainer, "served": gain.served, "error": gain.error}
    return findings, about


def _answer_greedily(
    served: ServedModel,
    documents: list[dict[str, Any]],  # Any: token columns
    expected: list[list[dict[str, Any]]],  # Any: GreedyStep's fields
    spec: VerifySpec,
) -> list[tuple[list[int], list[GreedyStep]]]:
    answers: list[tuple[list[int], list[GreedyStep]]] = []
    for document, steps in zip(documents, expected, strict=False):  # the first few only
        body = greedy_request(served.served_model_name, document["prompt_ids"], len(steps))
        reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
        answers.append((greedy_tokens(reply), [GreedyStep(**step) for step in steps]))
    return answers


def reference_scores(
    served: ServedModel,
    documents: list[dict[str, Any]],  # Any: token columns
    spec: VerifySpec,
    store: ArtifactStore,
) -> dict[str, Any]:  # Any: lists of log-probabilities and, under "greedy", of steps
    """Return what tasks/verify/reference.py says of merged, base and adapter: once for the same weights and answers."""
    merged, adapter = store.ancestor(served, MergedModel), store.ancestor(served, TrainedAdapter)
    num_bytes = 4 if served.dtype == "float32" else 2  # of a parameter: what is stored in MXFP4 is opened wide
    needed = num_bytes * store.ancestor(adapter, BaseCheckpoint).num_parameters + (2 << 30)
    identity = [
        VERSION,
        merged.model_digest,
        adapter.base_digest,
        served.dtype,
        [d["row_id"] for d in documents],
        adapter.key,
        spec.num_greedy_prompts,
        spec.greedy_tokens,
    ]
    folder = store.root / "reference" / sha256(repr(identity).encode()).hexdigest()[:16]
    result = folder / "scores.json"
    with files.lock_file(folder.with_suffix(".lock"), "the reference scores"):
        if not result.exists():
            machine.require_memory(needed, "scoring with transformers", "verify on a machine with more memory")
            job = {
                "merged": merged.model_folder,
                "base": adapter.base_folder,
                "adapter": adapter.adapter_folder,
                "documents": documents,
                "dtype": served.dtype,
                "num_greedy_prompts": spec.num_greedy_prompts,
                "greedy_tokens": spec.greedy_tokens,
                "result": str(result),
            }
            files.write_json(folder / "job.json", job)
            _run_reference(folder)
        return files.read_json(result)


def _run_reference(folder: Path) -> None:
    log = folder / "output.log"
    env = without_secrets(os.environ)
    env.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(_ROOT))
    code = run_child([sys.executable, "-m", "tasks.verify.reference", str(folder / "job.json")], env, log)
    if code:
        raise ServiceError(f"scoring with transformers ended with code {code}; its last lines:\n{last_lines(log)}")


def check_health(served: ServedModel, spec: VerifySpec) -> dict[str, Any]:  # Any: JSON values
    """Return what both services say of themselves. Raises ServiceError when one is not well."""
    health = get_json(f"{served.gateway_url}/health", spec.request_timeout_s)
    if served.candidate_slot:
        health = {"gateway": "ok", "vllm": True, "asked": "vLLM itself"}  # it answered 200
    if health.get("gateway") != "ok" or health.get("vllm") is not True:
        raise ServiceError(f"the gateway at {served.gateway_url} says {health}, expected gateway ok and vllm true")
    names = [model["id"] for model in get_json(f"{served.gateway_url}/v1/models", spec.request_timeout_s)["data"]]
    if served.served_model_name not in names:
        raise ServiceError(f"{served.gateway_url} serves {', '.join(names)}, expected {served.served_model_name}")
    return health
