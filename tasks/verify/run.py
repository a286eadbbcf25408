"""Ask the live endpoint, compare with the merged files and with the base, write the report.

Ring: edge.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.artifacts import (
    ArtifactStore,
    BaseCheckpoint,
    HealthReport,
    MergedModel,
    PackedDataset,
    PretrainedModel,
    ReinforcedModel,
    ServedModel,
    TrainedAdapter,
    TrainedModel,
    make_key,
)
from tasks.errors import AttestationError, ServiceError
from tasks.specs import VerifySpec
from tasks.verify.base_probes import check_base_scores
from tasks.verify.chat import ask, check_texts
from tasks.verify.client import get_json
from tasks.verify.greedy import GreedyStep, compare_greedy
from tasks.verify.probes import Gain, Scores, check_gain, check_scores, compare, mean, measure_gain
from tasks.verify.reinforced_probes import check_reinforced_scores, find_doubt
from tasks.verify.scoring import computed_once, endpoint_answers, endpoint_scores
from tasks.verify.whole import find_whole, probe_documents, whole_scores

VERSION = 3
ShowFn = Callable[[HealthReport, dict[str, Any]], None]  # Any: JSON values


def verify_model(served: ServedModel, spec: VerifySpec, store: ArtifactStore, show: ShowFn) -> HealthReport:
    """Probe the served model through the gateway; commit a report whether it passed or not.

    Args:
        served: the live endpoint; its parents lead to the merged model, the base and the data, or to a model that
            was trained as a whole and what it learnt from.
        spec: what it has to show.
        store: where those artifacts are.
        show: called with the report and what stands beside it, passed or failed.
    Raises: AttestationError when the served model is not the merged one or no better than its base (of a pretrained
        one: than random weights; of one that was trained with rewards: when it can't be told from its base);
        ServiceError or TransientError when the endpoint is not healthy.
    """
    key = make_key("verify", VERSION, spec, {"time": str(time.time_ns())}, (served,))
    with store.claim(HealthReport, key) as claim:
        whole = find_whole(served, store)
        if whole:
            findings, about = probe_whole(served, whole, spec, store)
            failure = find_whole_failure(findings, whole, spec, served.dtype)
        else:
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


def find_whole_failure(
    findings: Findings, model: TrainedModel, spec: VerifySpec, dtype: str
) -> AttestationError | None:
    """The same for a model that was trained as a whole."""
    check = check_reinforced_scores if isinstance(model, ReinforcedModel) else check_base_scores
    try:
        check(findings.scores, spec, dtype)
        for served, expected in findings.greedy:
            compare_greedy(served, expected, dtype)
    except AttestationError as error:
        return error
    return findings.broken


def probe_whole(
    served: ServedModel, model: TrainedModel, spec: VerifySpec, store: ArtifactStore
) -> tuple[Findings, dict[str, Any]]:  # Any: JSON values
    """Ask everything that is asked of the endpoint of a model that was trained as a whole.

    Its `gain` is what the loss of a pretraining fell by; rewards are another unit, of which `about` tells.
    """
    documents, folder = probe_documents(model, spec, store), Path(model.model_folder)
    reference = whole_scores(served, model, documents, spec, store)
    about = {"health": check_health(served, spec), "num_answers": len(documents), model.kind: model.origin}
    about["chat"], broken = ask(served, spec, folder)
    broken = check_texts(served, spec, folder) or broken
    values = endpoint_scores(served, documents, spec)
    files_scores, before = reference["merged"], reference["base"]
    scores = compare(values, files_scores, before, files_scores)
    scores = replace(scores, adapter_gap=0.0, adapter_move=0.0)  # there is no adapter to merge by other code
    if isinstance(model, ReinforcedModel):
        about["test_scores"] = [model.test_score_before, model.test_score_after]
        about["doubt"] = find_doubt(scores, spec, served.dtype)
    fallen = model.first_loss - model.last_loss if isinstance(model, PretrainedModel) else 0.0
    findings = Findings(
        scores=scores,
        gain=Gain(trainer=fallen, served=mean(values) - mean(before), error=0.0),
        greedy=endpoint_answers(served, documents, reference["greedy"], spec),
        broken=broken,
    )
    return findings, about


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
    values = endpoint_scores(served, documents, spec)
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
        greedy=endpoint_answers(served, documents, reference["greedy"], spec),
        broken=broken,
    )
    about["gain"] = {"trainer": gain.trainer, "served": gain.served, "error": gain.error}
    return findings, about


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
    job = {
        "merged": merged.model_folder,
        "base": adapter.base_folder,
        "adapter": adapter.adapter_folder,
        "documents": documents,
        "dtype": served.dtype,
        "num_greedy_prompts": spec.num_greedy_prompts,
        "greedy_tokens": spec.greedy_tokens,
    }
    return computed_once(identity, job, needed, store)


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
