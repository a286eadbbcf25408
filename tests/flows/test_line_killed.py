"""The whole line with real vLLM, killed in two of its steps, then sabotaged."""

import re
import signal
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, Evaluation, HealthReport, MergedModel, PublishedModel
from tasks.errors import AttestationError, CorruptError
from tasks.serve.run import serve_model
from tasks.specs import change
from tasks.verify.run import verify_model
from tests.flows.conftest import Line
from tests.flows.line import is_made, run_to_merge, serve_unchecked, wait_for_step
from tests.tasks.verify.sabotage import stale_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.chaos  # in make vllm-test: five minutes that CI has not; test_worker_kills.py kills in every step
def test_killed_in_train_and_in_serve_it_ends_with_the_same_verified_result(line: Line, tmp_path: Path):
    """The two steps whose children outlive the flow; test_worker_kills.py kills in all seven."""
    uninterrupted = run_to_merge(line.recipe, ArtifactStore(tmp_path / "uninterrupted"))
    for step in ("train", "serve"):
        log = tmp_path / f"{step}.log"
        process = line.start(log)
        assert wait_for_step(line.store, step, lambda: process.poll() is None), log.read_text()[-3000:]  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_made(line.store, step)

    log = tmp_path / "last.log"
    assert line.start(log).wait(timeout=400) == 0, log.read_text()[-3000:]
    report = line.store.committed(HealthReport)[-1]
    assert report.passed
    assert line.store.ancestor(report, MergedModel).model_digest == uninterrupted.model_digest
    skipped = set(re.findall(r"skipped: (\w+)/", log.read_text()))
    assert {"dataset", "packed", "adapter", "merged"} <= skipped


@pytest.mark.chaos
def test_the_evaluation_gate_measures_vllm_and_model_files_alike(verified: Line, tmp_path: Path):
    """Log-probabilities and greedy answers of real vLLM against transformers, and the tune against its base."""
    from tasks.artifacts import ServedModel
    from tasks.evaluate.kept import read_results
    from tasks.evaluate.run import evaluate_candidate, evaluate_model
    from tasks.evaluate.subjects import Subject, make_yardstick
    from tests.tasks.evaluate.conftest import write_suite

    served = verified.store.committed(ServedModel)[-1]
    changes = {"questions": str(write_suite(tmp_path / "suite")), "max_answer_tokens": 6, "min_base_margin": 0.02}
    spec = change(verified.recipe.evaluate, changes)
    decision = evaluate_candidate(served, spec, verified.store, lambda *told: None, {})
    assert decision.promoted, decision.reasons
    yardstick = make_yardstick(served, spec, verified.store)
    asked = read_results(next(e for ref in decision.parents if isinstance(e := verified.store.load(ref), Evaluation)))
    opened = read_results(
        evaluate_model(Subject(model_digest="as files", folder=Path(served.model_folder)), yardstick, verified.store)
    )
    assert asked.validation_loss == pytest.approx(opened.validation_loss, abs=1e-3)
    for ours, theirs in zip([*asked.questions, *asked.safety], [*opened.questions, *opened.safety], strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-3)
        assert ours.said == theirs.said, ours.id


def attestation_of(line: Line, folder: Path) -> str:
    """Serve a folder in the published one's place, past the comparison of files; return why verify refuses it."""
    published = line.store.committed(PublishedModel)[-1]
    sabotaged = published.model_copy(update={"model_folder": str(folder)})
    with pytest.raises(CorruptError, match="is not the merged file"):
        serve_model(sabotaged, line.recipe.serve, line.store)
    served = serve_unchecked(published, folder, line.recipe.serve, line.store)
    shown: list[HealthReport] = []
    with pytest.raises(AttestationError) as caught:
        verify_model(served, line.recipe.verify, line.store, lambda report, about: shown.append(report))
    assert [report.passed for report in shown] == [False]
    assert line.store.committed(HealthReport)[-1].passed is False
    return str(caught.value)


def test_a_deploy_that_serves_the_base_fails(verified: Line):
    """The base under the tuned model's name, everything else as it should be."""
    published = verified.store.committed(PublishedModel)[-1]
    base = verified.store.ancestor(published, BaseCheckpoint)
    said = attestation_of(verified, Path(base.model_folder))
    assert "the served model is not the merged one" in said and "It answers like the base" in said


@pytest.mark.chaos
def test_a_deploy_with_a_stale_tokenizer_fails(verified: Line, tmp_path: Path):
    """Token ids are scored as ever: only the reading of a text tells."""
    published = verified.store.committed(PublishedModel)[-1]
    base = verified.store.ancestor(published, BaseCheckpoint)
    folder = stale_tokenizer(Path(published.model_folder), Path(base.model_folder), tmp_path / "stale")
    assert "a stale tokenizer is served" in attestation_of(verified, folder)
