"""Prompts are those that were packed; what can't be asked or compared is said."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore
from tasks.errors import DataError, SpecError
from tasks.reinforce.prompts import Prompt, collect_prompts, completion_tokens, require_enough
from tasks.specs import ReinforceSpec
from tests.tasks.reinforce import runs
from tests.tiny import byte_tokenizer


def row(*documents: tuple[str, str]) -> dict[str, Any]:
    """A packed row of documents."""
    tokenizer, packed = byte_tokenizer(), {"input_ids": [], "labels": [], "seq_lengths": []}
    for question, answer in documents:
        prompt = tokenizer(f"<|start|>user<|message|>{question}<|end|><|start|>assistant")["input_ids"]
        ids = tokenizer(f"<|channel|>final<|message|>{answer}<|return|>")["input_ids"]
        packed["input_ids"] += prompt + ids
        packed["labels"] += [-100] * len(prompt) + ids
        packed["seq_lengths"].append(len(prompt) + len(ids))
    return packed


def test_questions_come_back_out_of_packed_rows_as_they_went_in(tmp_path: Path):
    import pyarrow.parquet as pq

    packed, base = runs.make_artifacts(ArtifactStore(tmp_path / "home"), tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.model_folder)
    prompts, twice = collect_prompts(pq.read_table(packed.path / "train.parquet").to_pylist(), tokenizer)
    assert twice == 0 and len(prompts) == packed.num_train_documents
    assert all(str(eval(p.question.removesuffix("=?"))) == p.answer for p in prompts)
    asked = [{"role": "user", "content": prompts[0].question}]
    assert list(prompts[0].ids) == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_a_question_that_is_there_twice_is_asked_once_and_two_answers_are_an_error():
    prompts, twice = collect_prompts([row(("1+1?", "2"), ("1+2?", "3")), row(("1+1?", "2"))], byte_tokenizer())
    assert [prompt.answer for prompt in prompts] == ["2", "3"] and twice == 1
    with pytest.raises(DataError, match=r"'1\+1\?' has two answers, '2' and '3'"):
        collect_prompts([row(("1+1?", "2"), ("1+1?", "3"))], byte_tokenizer())
    with pytest.raises(DataError, match="no question is left"):
        collect_prompts([], byte_tokenizer())


def test_a_prompt_that_leaves_no_room_is_named():
    prompts = [Prompt(ids=(1,) * 90, question="a long one", answer="x")]
    with pytest.raises(SpecError, match="'a long one' has 90 tokens, which leaves 10 for a completion"):
        completion_tokens(prompts, ReinforceSpec(max_sequence_tokens=100, max_completion_tokens=20))
    assert completion_tokens(prompts, ReinforceSpec(max_sequence_tokens=100, max_completion_tokens=10)) == 10


def test_fewer_questions_than_a_step_asks_is_an_error():
    with pytest.raises(DataError, match="1 questions but a step asks 2 "):
        require_enough(1, ReinforceSpec())
