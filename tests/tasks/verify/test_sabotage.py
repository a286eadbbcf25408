"""Every way to serve, or to merge, the wrong weights fails the attestation; the right ones pass.

The same checks as against a live endpoint, with transformers in vLLM's place: a real trained adapter on a tiny
gpt-oss, real merged files, sabotaged on disk. tests/flows/test_sabotage.py serves them by a real vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.artifacts import ArtifactStore, MergedModel, PackedDataset, TrainedAdapter
from tasks.merge.run import merge_adapter
from tasks.specs import MergeSpec, VerifySpec
from tasks.train.run import train_adapter
from tasks.verify import reference
from tasks.verify.greedy import GreedyStep
from tasks.verify.probes import compare, measure_gain
from tasks.verify.run import Findings, find_failure
from tests.tasks.train.runs import SPEC, make_artifacts
from tests.tasks.verify import sabotage

VERIFY = VerifySpec(max_logprob_gap=0.005, min_base_margin=0.05, num_answers=12, greedy_tokens=8)
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Tuned:
    """Two tunes of one base: the second is another adapter's."""

    packed: PackedDataset
    adapter: TrainedAdapter
    merged: MergedModel
    other: MergedModel
    documents: list[dict[str, Any]]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    store = ArtifactStore(folder / "home")
    packed, base = make_artifacts(store, folder)
    merged, adapters = [], []
    for seed in (1, 2):
        adapters.append(train_adapter(packed, base, SPEC.model_copy(update={"seed": seed}), store, lambda record: None))
        merged.append(merge_adapter(adapters[-1], MergeSpec(), store))
    documents = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()
    return Tuned(packed, adapters[0], merged[0], merged[1], documents[: VERIFY.num_answers])


def attest(tuned: Tuned, served: Path, merged: Path | None = None) -> str:
    """Serve `served` while the artifacts say that `merged` (by default the true one) was merged; return the fault."""
    said = reference.compute(
        {
            "documents": tuned.documents,
            "dtype": "float32",
            "merged": merged or tuned.merged.model_folder,
            "base": tuned.adapter.base_folder,
            "adapter": tuned.adapter.adapter_folder,
            "num_greedy_prompts": 2,
            "greedy_tokens": VERIFY.greedy_tokens,
        }
    )
    model = reference.load_model(served, "float32")
    values = reference.score_documents(model, tuned.documents)
    trainer = tuned.adapter.validation_loss_before - tuned.adapter.validation_loss_after
    answers = [
        (
            [int(step["token"]) for step in reference.answer_greedily(model, document["prompt_ids"], len(steps))],
            [GreedyStep(**step) for step in steps],
        )
        for document, steps in zip(tuned.documents, said["greedy"], strict=False)
    ]
    findings = Findings(
        scores=compare(values, said["merged"], said["base"], said["tuned"]),
        gain=measure_gain(
            values,
            said["base"],
            [len(document["answer_ids"]) for document in tuned.documents],
            trainer=trainer,
            num_documents=tuned.packed.num_validation_documents,
        ),
        greedy=answers,
        broken=None,
    )
    return str(find_failure(findings, VERIFY, "float32") or "")


def test_what_was_merged_and_served_passes(tuned: Tuned):
    assert attest(tuned, Path(tuned.merged.model_folder)) == ""


@pytest.mark.parametrize("wreck", sabotage.OF_WEIGHTS)
def test_a_server_of_wrong_weights_fails(tuned: Tuned, tmp_path: Path, wreck: Callable[[Path, Path, Path], Path]):
    served = wreck(Path(tuned.merged.model_folder), Path(tuned.adapter.base_folder), tmp_path / "served")
    assert "the served model is not the merged one" in attest(tuned, served)


@pytest.mark.parametrize("wreck", sabotage.OF_WEIGHTS)
def test_a_merge_of_wrong_weights_fails_though_it_is_served_faithfully(
    tuned: Tuned, tmp_path: Path, wreck: Callable[[Path, Path, Path], Path]
):
    """Served and merged agree to the last digit: only what was trained tells."""
    merged = wreck(Path(tuned.merged.model_folder), Path(tuned.adapter.base_folder), tmp_path / "merged")
    assert "the merged model is not its base with its adapter" in attest(tuned, merged, merged)


def test_another_adapters_merge_fails_wherever_it_comes_in(tuned: Tuned):
    """A tune of the same base on the same rows: its mean is as good."""
    other = Path(tuned.other.model_folder)
    assert "the served model is not the merged one" in attest(tuned, other)
    assert "the merged model is not its base with its adapter" in attest(tuned, other, other)
