"""Measure candidate, base and incumbent once each, decide, and keep both.

    ServedModel -> Evaluation of each (cached by model and yardstick) -> Decision, or GateError

The candidate is asked at its endpoint, the others from their files in a process of its own.

Ring: edge.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tasks import files, machine
from tasks.artifacts import ArtifactStore, Decision, Evaluation, ServedModel, make_key
from tasks.children import run_child
from tasks.environment import without_secrets
from tasks.errors import GateError, MissingError, ServiceError
from tasks.evaluate import plugins
from tasks.evaluate.decide import decide
from tasks.evaluate.endpoint import EndpointModel
from tasks.evaluate.kept import read_results, write_lines, write_results
from tasks.evaluate.measure import Asked, ask
from tasks.evaluate.prompts import Item, Prompts, Suite, render_suite
from tasks.evaluate.report import Compared, decision_markdown, differences
from tasks.evaluate.results import DocumentLoss, Results, judge_question, judge_safety, share
from tasks.evaluate.subjects import VERSION, Subject, Yardstick, base_of, find_incumbent, make_yardstick
from tasks.processes import last_lines
from tasks.specs import EvaluateSpec

ShowFn = Callable[[Decision, str, list[dict[str, Any]]], None]  # Any: cells are plain values
_ROOT = Path(__file__).resolve().parents[2]
logger = logging.getLogger(__name__)


def evaluate_candidate(
    served: ServedModel, spec: EvaluateSpec, store: ArtifactStore, show: ShowFn, verified: Mapping[str, str]
) -> Decision:
    """Measure what has to be measured and decide; the decision is kept and shown whatever it is.

    Args:
        served: the live candidate; its parents lead to base and validation answers.
        spec: knobs and rule.
        store: where those artifacts are.
        show: called with the decision, its report and the differences.
        verified: `model` and `ids` of the incumbent, as the handover remembers them; empty: the last promoted one.
    Raises: GateError when the rule refuses it; MissingError, ServiceError or TransientError when it can't be measured.
    """
    plugins.require(spec.plugins)
    yardstick = make_yardstick(served, spec, store)
    candidate = Subject(
        model_digest=served.model_digest,
        folder=Path(served.model_folder),
        url=served.vllm_url,
        name=served.served_model_name,
        parents=(served,),
    )
    ours = evaluate_model(candidate, yardstick, store)
    theirs = evaluate_model(base_of(served, store), yardstick, store)
    incumbent = find_incumbent(served, verified, store)
    before = evaluate_model(incumbent, yardstick, store) if incumbent else None
    compared = Compared(
        candidate=read_results(ours), base=read_results(theirs), incumbent=read_results(before) if before else None
    )
    verdict = decide(compared.candidate, compared.base, compared.incumbent, spec)
    evaluations = (ours, theirs, *([before] if before else []))
    key = make_key("decide", VERSION, spec, {"rule": spec.model_dump_json()}, (served, *evaluations))
    with store.claim(Decision, key) as claim:
        decision = Decision(
            key=key,
            folder=str(claim.folder),
            parents=tuple(parent.ref for parent in (served, *evaluations)),
            promoted=verdict.promoted,
            reasons=verdict.reasons,
            model_digest=served.model_digest,
            model_folder=served.model_folder,
            incumbent_digest=incumbent.model_digest if incumbent else "",
            served_model_name=served.served_model_name,
        )
        report = decision_markdown(served.served_model_name, compared, verdict, decision.folder)
        rows = differences(compared)
        if not claim.found:
            write_lines(claim.folder / "differences.jsonl", rows)
            files.write_text(claim.folder / "report.md", report)
            about = {"checks": [asdict(check) for check in verdict.checks]}
            claim.commit(decision, spec=spec, about=about)
    show(decision, report, rows)
    if not decision.promoted:
        raise GateError(
            f"{served.served_model_name} ({served.model_digest[:12]}) is not promoted: {'; '.join(decision.reasons)}. "
            f"Report: {decision.folder}/report.md; the rule is EvaluateSpec"
        )
    return decision


def evaluate_model(subject: Subject, yardstick: Yardstick, store: ArtifactStore) -> Evaluation:
    """Return the evaluation of one model: of files what there is already, of an endpoint one for this deploy."""
    if not subject.url:
        for found in store.committed(Evaluation):
            if (found.model_digest, found.yardstick) == (subject.model_digest, yardstick.digest):
                logger.info("skipped: %s was measured before (%s)", subject.model_digest[:12], found.ref)
                return found
    pins = {"model": subject.model_digest, "yardstick": yardstick.digest, "source": subject.url or "files"}
    parents = subject.parents if subject.url else ()
    key = make_key("evaluate", VERSION, yardstick.spec, pins, parents)
    with store.claim(Evaluation, key) as claim:
        if claim.found:
            return claim.found
        results = measure(subject, yardstick, claim.folder)
        write_results(claim.folder, results)
        evaluation = Evaluation(
            key=key,
            folder=str(claim.folder),
            parents=tuple(parent.ref for parent in subject.parents),
            model_digest=subject.model_digest,
            yardstick=yardstick.digest,
            source="endpoint" if subject.url else "files",
            validation_loss=results.validation_loss,
            choice_accuracy=share([item.is_chosen for item in results.questions]),
            exact_accuracy=share([item.is_exact for item in results.questions]),
            safety_preferred=share([item.is_preferred for item in results.safety]),
            safety_generated=share([item.is_generated for item in results.safety]),
            num_documents=len(results.documents),
            num_questions=len(results.questions),
            num_safety=len(results.safety),
        )
        return claim.commit(evaluation, spec=yardstick.spec, about={"dtype": yardstick.dtype})


def measure(subject: Subject, yardstick: Yardstick, folder: Path) -> Results:
    """Ask a model everything, working in `folder`."""
    prompts = render_suite(subject.folder, yardstick.suite, yardstick.pack)
    documents = yardstick.documents if prompts.vocabulary == yardstick.vocabulary else []
    asked = [
        Item(prompt_ids=document["prompt_ids"], continuations=[document["answer_ids"]]).values()
        for document in documents
    ]
    asked += [item.values() for item in (*prompts.questions, *prompts.safety)]
    if subject.url:
        model = EndpointModel(subject.url, subject.name, yardstick.spec.request_timeout_s)
        replies = ask(model, asked, yardstick.spec.max_answer_tokens, prompts.stop_ids)
        words = plugins.endpoint_arguments(subject.url, subject.name, subject.folder)
    else:
        device = choose_device(yardstick)
        replies = _ask_files(subject, yardstick, asked, prompts.stop_ids, device, folder)
        words = plugins.files_arguments(subject.folder, yardstick.dtype, "cpu" if device == "cpu" else "cuda:0")
    logger.info("asked %d items of %s", len(asked), subject.url or subject.folder)
    results = judge(replies, documents, yardstick.suite, prompts)
    found = {plugin: plugins.run(plugin, words, folder / plugin.replace(":", "-")) for plugin in yardstick.spec.plugins}
    return replace(results, plugins=found)


def judge(replies: list[Asked], documents: list[dict[str, Any]], suite: Suite, prompts: Prompts) -> Results:
    """Turn replies, in the order they were asked, into results."""
    losses = [
        DocumentLoss(row_id=row["row_id"], nats=-sum(reply["logprobs"][0]), num_tokens=len(row["answer_ids"]))
        for row, reply in zip(documents, replies, strict=False)
    ]
    answers = replies[len(documents) :]
    questions = [
        judge_question(question, reply["logprobs"], prompts.text(reply["generated"]))
        for question, reply in zip(suite.questions, answers, strict=False)
    ]
    safety = [
        judge_safety(question, reply["logprobs"], prompts.text(reply["generated"]))
        for question, reply in zip(suite.safety, answers[len(suite.questions) :], strict=True)
    ]
    return Results(documents=losses, questions=questions, safety=safety)


def choose_device(yardstick: Yardstick) -> str:
    """Return "cpu", or the number of the GPU that has room for the model. Raises CapacityError."""
    wanted = yardstick.spec.device
    gpus = machine.list_gpus() if wanted != "cpu" else []
    roomy = [number for number, gpu in enumerate(gpus) if gpu.free_bytes > 1.15 * yardstick.needed_bytes]
    if roomy:
        return str(roomy[0])
    if wanted == "cuda":
        raise MissingError(
            f"EvaluateSpec.device is cuda but none of {len(gpus)} GPUs has {yardstick.needed_bytes / 1e9:.1f} GB free: "
            "use auto or cpu, or stop what holds it"
        )
    way_out = "evaluate on a machine with more memory, or on a GPU"
    machine.require_memory(yardstick.needed_bytes, "scoring with transformers", way_out)
    return "cpu"


def _ask_files(
    subject: Subject,
    yardstick: Yardstick,
    items: list[dict[str, Any]],  # Any: Item.values()
    stop_ids: list[int],
    device: str,
    folder: Path,
) -> list[Asked]:
    job, result, log = folder / "job.json", folder / "asked.json", folder / "output.log"
    values = {
        "folder": str(subject.folder),
        "dtype": yardstick.dtype,
        "device": "cpu" if device == "cpu" else "cuda:0",
        "items": items,
        "max_tokens": yardstick.spec.max_answer_tokens,
        "stop_ids": stop_ids,
        "result": str(result),
    }
    files.write_json(job, values)
    env = without_secrets(os.environ)
    env.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="" if device == "cpu" else device, PYTHONPATH=str(_ROOT))
    code = run_child([sys.executable, "-m", "tasks.evaluate.worker", str(job)], env, log)
    if code:
        raise ServiceError(f"evaluating {subject.folder} ended with code {code}; its last lines:\n{last_lines(log)}")
    replies: list[Asked] = files.read_json(result)
    job.unlink()  # large, and made again from the questions
    result.unlink()
    return replies
