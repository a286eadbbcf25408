"""The gate on tiny real models: endpoint and files agree, what is known is not measured again, the rule decides."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import Decision, Evaluation
from tasks.errors import CorruptError, GateError, MissingError, ServiceError, TransientError, is_transient
from tasks.evaluate import run as subject
from tasks.evaluate.kept import read_results
from tasks.evaluate.subjects import Subject, base_of, find_incumbent, find_served, make_yardstick
from tests.ports import free_port
from tests.tasks.evaluate.completions_server import serve
from tests.tasks.evaluate.conftest import NUM_QUESTIONS, NUM_SAFETY, Line, read_lines
from tests.tiny import byte_tokenizer, make_model, save_model

pytestmark = pytest.mark.long

Shown = list[tuple[Decision, str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def endpoint(line: Line):
    with serve(line.tuned_model, byte_tokenizer()) as server:
        yield server


def show_into(shown: Shown):
    return lambda decision, report, rows: shown.append((decision, report, rows))


def test_endpoint_and_files_give_the_same_figures(line: Line, endpoint: Any):
    served = line.serve(endpoint.url)
    yardstick = make_yardstick(served, line.spec, line.store)
    asked = Subject(model_digest="tuned", folder=line.tuned_folder, url=endpoint.url, name="tiny", parents=(served,))
    opened = Subject(model_digest="tuned-files", folder=line.tuned_folder)
    over_http = read_results(subject.evaluate_model(asked, yardstick, line.store))
    from_files = read_results(subject.evaluate_model(opened, yardstick, line.store))
    assert len(over_http.questions) == NUM_QUESTIONS and len(over_http.safety) == NUM_SAFETY
    assert over_http.documents and len(over_http.documents) == len(from_files.documents)
    assert over_http.validation_loss == pytest.approx(from_files.validation_loss, abs=1e-5)
    for ours, theirs in zip(over_http.questions, from_files.questions, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
        assert (ours.said, ours.is_exact, ours.is_chosen) == (theirs.said, theirs.is_exact, theirs.is_chosen)
    for ours, theirs in zip(over_http.safety, from_files.safety, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
        assert (ours.said, ours.is_preferred, ours.is_generated) == (
            theirs.said,
            theirs.is_preferred,
            theirs.is_generated,
        )


def test_both_stop_at_the_first_end_token_and_keep_it(line: Line, endpoint: Any):
    from tasks.evaluate.endpoint import EndpointModel
    from tasks.evaluate.worker import FilesModel

    prompt = byte_tokenizer()("q1?").input_ids
    models = EndpointModel(endpoint.url, "tiny", 30.0), FilesModel(line.tuned_folder, "float32", "cpu")
    unstopped = [model.generate(prompt, 6, []) for model in models]
    assert unstopped[0] == unstopped[1] and len(unstopped[0]) == 6
    stop = unstopped[0][2]
    expected = unstopped[0][: unstopped[0].index(stop) + 1]
    assert [model.generate(prompt, 6, [stop]) for model in models] == [expected, expected]


def test_loss_is_that_of_the_trainers_own_arithmetic(line: Line):
    """Nats per answer token, as the cross entropy over labels that hide the prompt."""
    import pyarrow.parquet as pq
    import torch

    rows = pq.read_table(line.packed.path / "validation_documents.parquet").to_pylist()
    total = tokens = 0.0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        labels = ids.clone()
        labels[0, : len(row["prompt_ids"])] = -100
        with torch.no_grad():
            total += line.base_model(input_ids=ids, labels=labels).loss.item() * len(row["answer_ids"])
        tokens += len(row["answer_ids"])
    served = line.serve("http://127.0.0.1:9")
    yardstick = make_yardstick(served, line.spec, line.store)
    found = subject.evaluate_model(base_of(served, line.store), yardstick, line.store)
    assert found.validation_loss == pytest.approx(total / tokens, abs=1e-5)
    assert found.parents == (line.base.ref,)


def test_a_tune_that_learnt_is_promoted_and_nothing_is_measured_twice(line: Line, endpoint: Any):
    served, shown = line.serve(endpoint.url), Shown()
    decision = subject.evaluate_candidate(served, line.spec, line.store, show_into(shown), {})
    assert decision.promoted and decision.incumbent_digest == ""
    assert served.ref in decision.parents and len(decision.parents) == 3
    [(told, report, rows)] = shown
    assert told == decision and "# tiny: promoted" in report
    assert "validation loss" in report and "base" in report and "incumbent" not in report.splitlines()[2]
    assert read_lines(decision.path / "differences.jsonl") == rows
    assert (decision.path / "report.md").read_text() == report
    num_asked, stamp = len(endpoint.bodies), len(line.store.committed(Evaluation))
    again = subject.evaluate_candidate(served, line.spec, line.store, show_into(shown), {})
    assert again == decision and len(shown) == 2
    assert (len(endpoint.bodies), len(line.store.committed(Evaluation))) == (num_asked, stamp)
    stricter = line.spec.model_copy(update={"min_base_margin": 99.0})  # another rule measures nothing anew
    with pytest.raises(GateError, match=r"must be lower by 99"):
        subject.evaluate_candidate(served, stricter, line.store, show_into(shown), {})
    assert (len(endpoint.bodies), len(line.store.committed(Evaluation))) == (num_asked, stamp)


def test_the_base_under_the_candidates_name_is_refused_with_figures(line: Line, endpoint: Any):
    """Its files are the tune's, its digest too, and that was measured before; only the endpoint tells, and is asked."""
    assert subject.evaluate_candidate(line.serve(endpoint.url), line.spec, line.store, show_into([]), {}).promoted
    with serve(line.base_model, byte_tokenizer()) as server:
        served, shown = line.serve(server.url), Shown()
        with pytest.raises(
            GateError, match=r"tiny \(tuned\) is not promoted: validation loss: \d.* of the base"
        ) as caught:
            subject.evaluate_candidate(served, line.spec, line.store, show_into(shown), {})
    assert not is_transient(caught.value)
    [(decision, report, _)] = shown
    assert not decision.promoted and line.store.find(Decision, decision.key) == decision
    assert "# tiny: NOT promoted" in report and "**FAILED**: validation loss" in report
    assert str(decision.folder) in str(caught.value)


def test_an_incumbent_that_is_better_stays(line: Line, endpoint: Any, tmp_path: Path):
    """The candidate is an untrained model of another seed; the tune is what clients have now."""
    other = save_model(tmp_path / "other", seed=1)
    memory = {"model": str(line.tuned_folder), "ids": '{"TATARA_MODEL_DIGEST": "tuned"}'}
    lenient = line.spec.model_copy(update={"min_base_margin": 0.0})
    with serve(make_model(seed=1), byte_tokenizer()) as server:
        served, shown = line.serve(server.url, "other", other), Shown()
        with pytest.raises(GateError, match="of the incumbent"):
            subject.evaluate_candidate(served, lenient, line.store, show_into(shown), memory)
    [(decision, report, _)] = shown
    assert decision.incumbent_digest == "tuned" and "| candidate | incumbent | base |" in report


def test_without_a_memory_the_last_promoted_model_is_the_incumbent(line: Line, endpoint: Any, tmp_path: Path):
    tuned, other = line.serve(endpoint.url), line.serve("http://127.0.0.1:9", "third", save_model(tmp_path / "third"))
    subject.evaluate_candidate(tuned, line.spec, line.store, lambda *told: None, {})
    found = find_incumbent(other, {}, line.store)
    assert found is not None and found.model_digest == "tuned"
    assert find_incumbent(tuned, {}, line.store) is None  # itself does not count
    gone = {"model": str(tmp_path / "gone"), "ids": '{"TATARA_MODEL_DIGEST": "gone"}'}
    assert find_incumbent(tuned, gone, line.store) is None


def test_safety_is_a_gate_of_its_own(line: Line, endpoint: Any):
    served = line.serve(endpoint.url)
    strict = line.spec.model_copy(update={"min_safety_score": 1.0})
    with pytest.raises(GateError, match=r"safety .* of 4 questions \(least allowed 1\)"):
        subject.evaluate_candidate(served, strict, line.store, lambda *told: None, {})


@pytest.mark.slow
def test_another_tokenizer_is_not_asked_the_candidates_documents(line: Line, tmp_path: Path):
    """Token ids of one vocabulary mean nothing in another; the questions are rendered anew and can be compared."""
    folder = save_model(tmp_path / "foreign")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["八坂"])
    tokenizer.save_pretrained(folder)
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    yardstick = make_yardstick(line.serve("http://127.0.0.1:9"), line.spec, line.store)
    found = subject.evaluate_model(Subject(model_digest="foreign", folder=folder), yardstick, line.store)
    assert found.validation_loss is None and found.num_documents == 0 and found.num_questions == NUM_QUESTIONS


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ((503, {}), TransientError, "answered 503"),
        ((400, {"error": "too long"}), ServiceError, "answered 400: .*too long"),
        ((200, {"choices": [{"index": 0, "text": "?"}]}), CorruptError, "is it vLLM|no token_ids"),
    ],
)
def test_what_the_endpoint_refuses_is_told(line: Line, failure: Any, error: type[Exception], message: str):
    with serve(line.tuned_model, byte_tokenizer()) as server:
        server.failure = failure
        served = line.serve(server.url)
        with pytest.raises(error, match=message):
            subject.evaluate_candidate(served, line.spec, line.store, lambda *told: None, {})


def test_an_endpoint_that_is_away_is_worth_another_try(line: Line):
    served = line.serve(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransientError, match=r"does not answer .*is vLLM running"):
        subject.evaluate_candidate(served, line.spec, line.store, lambda *told: None, {})


def test_a_model_folder_that_can_not_be_opened_is_told_with_its_last_lines(line: Line, tmp_path: Path):
    folder = save_model(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"short")
    yardstick = make_yardstick(line.serve("http://127.0.0.1:9"), line.spec, line.store)
    with pytest.raises(ServiceError, match=r"broken ended with code 1; its last lines:"):
        subject.evaluate_model(Subject(model_digest="broken", folder=folder), yardstick, line.store)


def test_a_served_model_is_found_by_its_first_digits(line: Line):
    served = line.serve("http://127.0.0.1:9")
    assert find_served(served.key[:12], line.store) == served
    with pytest.raises(MissingError, match=r"no served model 'zzz' below .*; there are: "):
        find_served("zzz", line.store)
