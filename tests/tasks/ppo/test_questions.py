"""Questions: GSM8K's answers are found, what can't be scored is rejected by name, and the shipped ones add up."""

import json
import re

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from tasks.artifacts import ArtifactStore
from tasks.errors import DataError, MissingError
from tasks.ppo.prepare import SHIPPED, prepare_questions
from tasks.ppo.questions import RejectedQuestionError, extract_answer, read_question
from tasks.specs import QuestionsSpec

HUB = HfApi(token=False)
SPEC = QuestionsSpec()


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_found_with_and_without_separators(number):
    assert extract_answer(f"So it is #### no.\n#### {number:,}") == str(number)
    assert extract_answer(f"#### {number}") == str(number)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It is 42.", "has no ####"),
        ("#### forty", "'forty', expected a number"),
        ("#### 1,00", "'1,00', expected a number"),
        ("#### ", "'', expected a number"),
        ("#### 42 apples", "'42 apples', expected a number"),
    ],
)
def test_an_answer_that_nothing_can_score_is_rejected_with_its_reason(answer, reason):
    with pytest.raises(RejectedQuestionError, match=re.escape(reason)):
        read_question({"question": "how many?", "answer": answer}, SPEC, "train", 0)


def test_a_row_has_verls_schema():
    row = read_question({"question": "2+2?", "answer": "2+2=4\n#### 4"}, SPEC, "test", 7)
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"2+2? {SPEC.instruction}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "test", "index": 7, "answer": "2+2=4\n#### 4", "question": "2+2?"},
    }


def test_the_shipped_questions_are_prepared_once_and_their_arithmetic_is_right(store):
    questions = prepare_questions(SPEC, store, HUB)
    assert (questions.num_train_rows, questions.num_test_rows, questions.num_rejected_rows) == (256, 32, 0)
    assert prepare_questions(SPEC, store, HUB) == questions
    seen = set()
    for split in ("train", "test"):
        for row in pq.read_table(questions.path / f"{split}.parquet").to_pylist():
            answer, truth = row["extra_info"]["answer"], row["reward_model"]["ground_truth"]
            steps = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", answer)
            assert steps and steps[-1][3] == truth
            for left, sign, right, said in steps:
                a, b = int(left), int(right)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(said)
            seen.add(row["extra_info"]["question"])
    assert len(seen) == 288


def test_the_generator_makes_the_shipped_files_again(tmp_path):
    text = (SHIPPED / "generate.py").read_text()
    (tmp_path / "generate.py").write_text(text)
    exec(
        compile(text, str(tmp_path / "generate.py"), "exec"),
        {"__name__": "__main__", "__file__": str(tmp_path / "x.py")},
    )
    assert (tmp_path / "train.jsonl").read_bytes() == (SHIPPED / "train.jsonl").read_bytes()
    assert (tmp_path / "test.jsonl").read_bytes() == (SHIPPED / "test.jsonl").read_bytes()


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _rows(count):
    return [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(count)]


def test_a_file_is_split_by_content_and_an_edited_file_is_another_artifact(store, tmp_path):
    spec = QuestionsSpec(source=_write(tmp_path / "q.jsonl", _rows(100)), test_pct=20)
    first = prepare_questions(spec, store, HUB)
    assert first.num_train_rows + first.num_test_rows == 100 and 5 <= first.num_test_rows <= 40
    _write(tmp_path / "q.jsonl", _rows(101))
    assert prepare_questions(spec, store, HUB).key != first.key


def test_bad_rows_are_named_and_left_out_only_when_that_is_allowed(store, tmp_path):
    bad = {"question": "why?", "answer": "because"}
    train, test = _write(tmp_path / "a.jsonl", [*_rows(9), bad]), _write(tmp_path / "b.jsonl", _rows(2))
    spec = QuestionsSpec(source=train, test_source=test)
    with pytest.raises(DataError, match=r"1 of 12 rows can't be asked \(a\.jsonl:10: the answer has no ####"):
        prepare_questions(spec, store, HUB)
    questions = prepare_questions(spec.model_copy(update={"max_rejected_pct": 10.0}), store, HUB)
    assert (questions.num_train_rows, questions.num_test_rows, questions.num_rejected_rows) == (9, 2, 1)
    line = json.loads((questions.path / "rejected.jsonl").read_text())
    assert line == {
        "split": "train",
        "row_id": "a.jsonl:10",
        "reason": "the answer has no ####, which stands before its number",
    }


def test_a_file_that_is_not_there_is_said(store, tmp_path):
    with pytest.raises(MissingError, match=r"there is no file .*none\.jsonl"):
        prepare_questions(QuestionsSpec(source=str(tmp_path / "none.jsonl")), store, HUB)
