"""GRPO whose rollouts a real vLLM generates in the trainer's process: it runs the adapter, all of it."""

import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, TrainedAdapter
from tasks.errors import RewardError
from tasks.metrics import read_metrics
from tasks.reinforce.run import reinforce_adapter
from tasks.specs import ReinforceSpec, change
from tests.flows.line import need_vllm
from tests.tasks.reinforce import runs

pytestmark = pytest.mark.long

SPEC = change(runs.SPEC, {"rollouts": "vllm", "vllm_memory_share": 0.1, "rewards": runs.DYING})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, Any, Any]:
    need_vllm()
    folder = tmp_path_factory.mktemp("vllm")
    store = ArtifactStore(folder / "home")
    return (store, *runs.make_artifacts(store, folder / "sources", head_dim=32))


@pytest.fixture(scope="module")
def learnt(parts: Any) -> TrainedAdapter:
    store, packed, base = parts
    return reinforce_adapter(packed, base, SPEC, store, lambda record: None)


def test_what_vllm_generates_is_what_the_live_adapter_would_say(learnt: TrainedAdapter):
    records = read_metrics(Path(learnt.folder) / "metrics.jsonl")
    assert len(records) == SPEC.max_steps
    for record in records[1:]:  # at the first step the adapter changes nothing
        assert record["adapter_share"] == pytest.approx(1, abs=1e-3), record
        assert record["ratio_min"] > 0.999 and record["ratio_max"] < 1.001
    assert records[-1]["reward"] > records[0]["reward"] + 0.3


def test_a_killed_run_is_the_same_run(parts: Any, learnt: TrainedAdapter, tmp_path: Path):
    """What vLLM samples comes from the trainer's own generators, which a checkpoint holds."""
    _, packed, base = parts
    runs.assert_a_killed_run_is_the_same(packed, base, SPEC, learnt, tmp_path / "home")


def test_of_likely_tokens_alone_the_whole_models_log_probabilities_are_told(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else TRL weighs a completion by what its tokens' neighbours had: nothing is left of it after some tokens.

    The same process shows that a busy port is none of its concern, and that its failure is told at once.
    """
    _, packed, base = parts
    changes = {"top_k": 4, "rewards": [{"name": "tests.tasks.reinforce.failing_reward:score", "label": "digits"}]}
    with socket.create_server(("127.0.0.1", 0)) as busy:
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        with pytest.raises(RewardError, match="ValueError: no third step"):
            reinforce_adapter(packed, base, change(SPEC, changes), ArtifactStore(tmp_path), lambda record: None)
    (lines,) = tmp_path.rglob("metrics.jsonl")
    first, second = read_metrics(lines)
    assert all(record["ratio_min"] > 0.999 and record["ratio_max"] < 1.001 for record in (first, second))
    assert second["adapter_share"] == pytest.approx(1, abs=1e-3)


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReinforceSpec:
    """A spec with which `auto` chooses vLLM, on a machine that seems to have a GPU and has none."""
    runs.show_an_h200(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    failing = [{"name": "tests.tasks.reinforce.broken_rewards:fail_at_once"}]
    return change(SPEC, {"rollouts": "auto", "rewards": failing})


def test_a_reward_that_fails_in_the_first_step_is_not_vllms_fault(
    parts: Any, chosen: ReinforceSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _, packed, base = parts
    with caplog.at_level(logging.INFO), pytest.raises(RewardError, match=r"fail_at_once failed: ValueError: no score"):
        reinforce_adapter(packed, base, chosen, ArtifactStore(tmp_path), lambda record: None)
    assert "tokens by vllm" in caplog.text and "transformers generates" not in caplog.text


def test_a_vllm_that_does_not_open_says_so_and_transformers_generate(
    parts: Any,
    chosen: ReinforceSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """The reward, which fails, is then asked about what transformers generated."""
    _, packed, base = parts
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")  # GiB
    with caplog.at_level(logging.INFO), pytest.raises(RewardError, match="fail_at_once failed"):
        reinforce_adapter(packed, base, chosen, ArtifactStore(tmp_path), lambda record: None)
    assert "vLLM could not generate (vLLM failed: " in caplog.text and "tokens by transformers" in caplog.text
