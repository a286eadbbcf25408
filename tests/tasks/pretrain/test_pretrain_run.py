"""Pretraining by the real worker: repeatable to the bit, and its compact vocabulary is exact."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from torch.nn import functional

from flows.recipes import resolve_pretrain
from tasks.artifacts import ArtifactStore, PretrainedModel, TokenizedCorpus, digest_files, folder_digest
from tasks.corpus.run import prepare_corpus
from tasks.errors import CapacityError
from tasks.pretrain.compact import TiedRestTrainer, Vocabulary, expand
from tasks.pretrain.run import pretrain_key, pretrain_model
from tasks.pretrain.worker import build_model, pretrain
from tasks.specs import PretrainSpec, change
from tests.tasks.pretrain.runs import SPEC

SMALL = {"num_steps": 6, "save_steps": 6, "shape": {"num_layers": 1, "hidden_size": 32, "intermediate_size": 32}}


class NoSpecialTokens:
    bos_token_id = eos_token_id = pad_token_id = None


@pytest.mark.slow
def test_the_same_question_gives_the_same_bytes(tmp_path: Path, harmony_tokenizer: Path):
    """Once by the step, in a process of its own, and once by the worker's function alone."""
    spec, store = change(resolve_pretrain("tiny"), SMALL), ArtifactStore(tmp_path / "home")
    store.root.mkdir()
    (store.root / "tokenizers").symlink_to(harmony_tokenizer.parent)
    corpus = prepare_corpus(spec, store, HfApi(token=False))
    model = pretrain_model(spec, corpus, store, lambda record: None)
    (tmp_path / "again").mkdir()
    places = {"folder": str(tmp_path / "again"), "corpus_folder": corpus.folder}
    try:
        pretrain({**places, "spec": spec.model_dump(mode="json"), "corpus": {"dtype": corpus.dtype}})
    finally:
        torch.use_deterministic_algorithms(False)
    assert folder_digest(digest_files(tmp_path / "again" / "model")) == model.model_digest
    assert not (model.path / "checkpoints").exists()
    assert model.parents == (corpus.ref,)
    assert pretrain_model(spec, corpus, store, lambda record: None) == model


def test_what_is_trained_needs_no_room_to_be_committed(tmp_path: Path):
    """The parent was killed between the trainer's end and the commit; also a trainer that goes on holds its GPU."""
    spec, store = change(SPEC, {"shape": {"num_experts": 10**9}}), ArtifactStore(tmp_path)
    corpus = TokenizedCorpus(
        key="0" * 64, folder="", parents=(), source="", pins={"corpus": "0"}, dtype="uint16", vocab_size=9,
        num_documents=1, num_tokens=99,
    )  # fmt: skip
    with pytest.raises(CapacityError):
        pretrain_model(spec, corpus, store, lambda record: None)
    folder = store.folder(PretrainedModel, pretrain_key(spec, corpus.pins))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    result = {"num_parameters": 1, "first_loss": 2.0, "last_loss": 1.0, "memory": {}}
    (folder / "result.json").write_text(json.dumps(result))
    assert pretrain_model(spec, corpus, store, lambda record: None).last_loss == 1.0


def small_spec() -> PretrainSpec:
    return change(resolve_pretrain("tiny"), {"shape": {**SMALL["shape"], "vocab_size": 500}})


def test_the_compact_loss_is_the_full_softmax_of_the_expanded_model():
    spec = small_spec()
    torch.manual_seed(0)
    ids = torch.randint(0, 400, (3, 24)) // 7 * 7  # 58 of 500 ids
    vocabulary = Vocabulary(ids.flatten(), 500, is_compact=True)
    trained = build_model(spec, NoSpecialTokens(), vocabulary.num_classes).eval()
    with torch.no_grad():
        trained.lm_head.weight.normal_()
    inputs = {"input_ids": vocabulary.classes(ids), "labels": vocabulary.classes(ids)}
    holder = TiedRestTrainer.__new__(TiedRestTrainer)
    holder.rest_bias = float(torch.log(torch.tensor(float(vocabulary.num_rest))))
    compact = holder.compute_loss(trained, inputs)
    model = expand(trained, vocabulary, lambda: build_model(spec, NoSpecialTokens(), 500)).eval()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    full = functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(compact, full, rtol=1e-5, atol=1e-5)
