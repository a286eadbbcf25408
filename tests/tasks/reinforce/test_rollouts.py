"""What generates: vLLM where it fits beside the model that learns; where it was our choice and fails, transformers."""

import json
import logging
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tasks import errors
from tasks.artifacts import ArtifactStore
from tasks.errors import CapacityError, OutOfMemoryError, RewardError, RolloutError, SpecError, TrainingError
from tasks.machine import Gpu
from tasks.reinforce.rollouts import Rollouts, choose_rollouts, has_graphs
from tasks.reinforce.run import blame_engine, reinforce_adapter
from tasks.specs import ReinforceSpec, change
from tests.commands import write_commands
from tests.tasks.reinforce import runs

SPEC = change(runs.SPEC, {"rollouts": "auto", "max_steps": 2})
H200 = Gpu(name="NVIDIA H200", total_bytes=150 * 10**9, free_bytes=150 * 10**9)
H100 = Gpu(name="NVIDIA H100", total_bytes=85 * 10**9, free_bytes=85 * 10**9)
GPT_OSS = {"model_type": "gpt_oss"}
GPT_OSS_CONFIG = GPT_OSS | {"num_local_experts": 32, "rope_parameters": {"rope_type": "yarn", "factor": 32.0}}
GPT_OSS_20B = 42 * 10**9


@pytest.fixture(autouse=True)
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM's interpreter that tells its versions, and fails as one does in its first rollout.

    The worker that it runs leaves what the file $TOLD says of its end.
    """
    told = json.dumps([platform.python_version(), version("torch"), "0.32.0"])
    fails = '{ touch "$(dirname "$3")/metrics.jsonl"; echo no CUDA here; exit 1; }'
    says = '[ -e "$TOLD" ] && cp "$TOLD" "$(dirname "$3")/failure.json"; echo began >> "$(dirname "$3")/began"'
    write_commands(tmp_path / "vllm", {"python": f"[ \"$1\" = -I ] && echo '{told}' || {{ {says}; {fails}; }}"})
    monkeypatch.setenv("TATARA_VLLM_PYTHON", str(tmp_path / "vllm/python"))


def test_vllm_generates_where_a_gpu_holds_the_base_twice():
    chosen = choose_rollouts(SPEC, GPT_OSS, GPT_OSS_20B, H200)
    assert chosen.name == "vllm" and chosen.memory_share == pytest.approx(0.39)


@pytest.mark.parametrize(
    ("changes", "config", "gpu", "says"),
    [
        (
            {"vllm_memory_share": 0.2, "kernels": "stock"},
            GPT_OSS,
            H200,
            r"vLLM would get 30.0 GB \(ReinforceSpec.vllm_memory_share\)",
        ),
        ({"quantization": "nf4"}, GPT_OSS, H200, "with a quantised base"),
        ({}, {"quantization_config": {"quant_method": "mxfp4"}}, H200, "with a quantised base"),
        ({"top_p": 0.9, "temperature": 0.7}, GPT_OSS, H200, "with temperature = 0.7, top_p = 0.9 and top_k = 0"),
        ({}, {"model_type": "qwen3_moe"}, H200, "an adapter on the experts of a qwen3_moe: only those of gpt_oss"),
    ],
)
def test_else_transformers_do_and_vllm_is_refused(
    changes: dict[str, Any], config: dict[str, Any], gpu: Gpu, says: str, caplog: pytest.LogCaptureFixture
):
    spec: ReinforceSpec = change(SPEC, changes)
    with caplog.at_level(logging.INFO):
        assert choose_rollouts(spec, config, GPT_OSS_20B, gpu) == Rollouts(is_continuous=not spec.cuts_tail)
    with pytest.raises((SpecError, CapacityError), match=says) as refused:
        choose_rollouts(change(spec, {"rollouts": "vllm"}), config, GPT_OSS_20B, gpu)
    assert "several times slower than vLLM" in caplog.text and str(refused.value) in caplog.text


@pytest.mark.parametrize("gpu", [H100, None])
@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, GPT_OSS),
        ({}, GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}),
        ({"quantization": "int8", "max_sequence_tokens": 4096}, GPT_OSS),
        ({"quantization": "nf4"}, {"model_type": "qwen3"}),
    ],
)
def test_continuous_batching_does_where_vllm_does_not(changes: dict[str, Any], config: dict[str, Any], gpu: Gpu | None):
    assert choose_rollouts(change(SPEC, changes), config, GPT_OSS_20B, gpu) == Rollouts(is_continuous=True)


@pytest.mark.parametrize("gpu", [H100, None])
@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({"top_k": 5}, GPT_OSS, "with top_p = 1 and top_k = 5"),
        ({}, {"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "it has an attn_logit_softcapping"),
    ],
)
def test_generate_does_what_continuous_batching_can_not(
    changes: dict[str, Any], config: dict[str, Any], says: str, gpu: Gpu | None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        assert choose_rollouts(change(SPEC, changes), config, GPT_OSS_20B, gpu) == Rollouts()
    assert "generate, not its continuous batching" in caplog.text and says in caplog.text


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({}, GPT_OSS_CONFIG, True),
        ({"quantization": "nf4"}, GPT_OSS_CONFIG, True),
        ({"kernels": "stock"}, GPT_OSS_CONFIG, False),
        ({"quantization": "nf4"}, {"model_type": "qwen2"}, True),
        ({"quantization": "int8"}, {"model_type": "qwen2"}, False),
        ({}, {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, False),
        ({}, {"model_type": "own", "rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, False),
        ({}, {"model_type": "qwen3_moe", "num_experts": 128}, False),
        ({}, {"model_type": "mixtral", "num_local_experts": 8}, False),
    ],
)
def test_graphs_are_for_what_asks_the_gpu_nothing(changes: dict[str, Any], config: dict[str, Any], expected: bool):
    assert has_graphs(change(SPEC, changes), config) == expected


@pytest.mark.parametrize(
    "sizes",
    [{"original_max_position_embeddings": 4096}, {"rope_scaling": {"original_max_position_embeddings": 4096}}],
)
def test_rotations_that_change_amid_a_sequence_are_left_to_generate(sizes: dict[str, Any]):
    """phi3's at 128,000 tokens: where one request is longer than the first 4,096, all of a step turn otherwise."""
    config = {"max_position_embeddings": 131072, **sizes}
    config["rope_scaling"] = {**config.get("rope_scaling", {}), "type": "longrope"}
    for tokens in (4096, 4097):
        spec = change(SPEC, {"max_sequence_tokens": tokens})
        assert choose_rollouts(spec, config, GPT_OSS_20B, None) == Rollouts(is_continuous=tokens == 4096)


def test_continuous_batching_is_taken_when_it_is_named_and_refused_where_it_misleads():
    named = change(SPEC, {"rollouts": "continuous"})
    assert choose_rollouts(named, GPT_OSS, GPT_OSS_20B, H200).name == "continuous"
    with pytest.raises(SpecError, match=r"'continuous' with top_p = 1 and top_k = 5"):
        choose_rollouts(change(named, {"top_k": 5}), GPT_OSS, GPT_OSS_20B, H200)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "gemma2: it has an attn_logit_softcapping"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "kv_lora_rank"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attention that looks ahead"),
    ],
)
def test_continuous_batching_is_refused_for_models_that_it_does_wrongly(config: dict[str, Any], says: str):
    with pytest.raises(SpecError, match=f"{says}.*use 'transformers'"):
        choose_rollouts(change(SPEC, {"rollouts": "continuous"}), config, GPT_OSS_20B, H200)
    assert choose_rollouts(change(SPEC, {"rollouts": "transformers"}), config, GPT_OSS_20B, H200) == Rollouts()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RolloutError("no such kernel"), "continuous batching could not generate"),
        (OutOfMemoryError("4 GB"), "the memory did not suffice with continuous batching beside the model"),
        (TrainingError("NaN"), ""),
        (RewardError("no score"), ""),
    ],
)
def test_what_continuous_batching_did_is_told_from_what_else_failed(error: Exception, says: str):
    assert blame_engine(error, Rollouts(is_continuous=True)) == says
    assert blame_engine(error, Rollouts()) == ""  # nothing slower is left
    kept = says if isinstance(error, OutOfMemoryError) else ""  # its cache lies beside what learns
    assert blame_engine(error, Rollouts(is_continuous=True), has_begun=True) == kept


@pytest.fixture
def on_an_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.show_an_h200(tmp_path / "bin", monkeypatch)


@pytest.mark.long
@pytest.mark.usefixtures("on_an_h200")
def test_a_vllm_that_was_our_choice_and_fails_is_replaced_to_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = ArtifactStore(tmp_path / "home")
    packed, base = runs.make_artifacts(store, tmp_path / "sources")
    with pytest.raises(TrainingError, match="no CUDA here"):
        reinforce_adapter(packed, base, change(SPEC, {"rollouts": "vllm"}), store, lambda record: None)

    def cancel(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    spec = change(SPEC, {"max_steps": 16, "learning_rate": 1e-3})  # four are over before anybody looks
    with pytest.raises(KeyboardInterrupt):
        reinforce_adapter(packed, base, spec, store, cancel)
    assert "the worker ended beside vLLM without saying why" in caplog.text and "no CUDA here" in caplog.text
    adapter = reinforce_adapter(packed, base, spec, store, lambda record: None)
    assert adapter.num_steps == 16
    assert "resuming from checkpoint-" in (adapter.path / "output.log").read_text()


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Any, ...]:
    store = ArtifactStore(tmp_path / "home")
    return (*runs.make_artifacts(store, tmp_path / "sources"), store)


@pytest.mark.long
@pytest.mark.usefixtures("on_an_h200")
@pytest.mark.parametrize("kind", ["RewardError", "TrainingError", "DataError"])
def test_what_is_not_vllms_doing_is_raised_at_once_as_what_it_is(
    kind: str, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    packed, base, store = parts
    (tmp_path / "told.json").write_text(json.dumps({"error": kind, "message": "your reward my:own failed"}))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    with pytest.raises(getattr(errors, kind), match=r"^your reward my:own failed"):
        reinforce_adapter(packed, base, SPEC, store, lambda record: None)
    [began] = store.root.rglob("began")
    assert began.read_text() == "began\n" and "transformers generates" not in caplog.text


@pytest.mark.long
@pytest.mark.usefixtures("on_an_h200")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("RolloutError", r"vLLM could not generate \(no blocks left"),
        ("OutOfMemoryError", r"the memory did not suffice with vLLM beside the model \(no blocks left"),
    ],
)
def test_what_is_vllms_doing_is_done_by_transformers(
    kind: str,
    says: str,
    parts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    packed, base, store = parts
    (tmp_path / "told.json").write_text(json.dumps({"error": kind, "message": "no blocks left"}))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    failing = {"rewards": [{"name": "tests.tasks.reinforce.broken_rewards:fail_at_once"}]}
    with pytest.raises(
        RewardError, match=r"your reward .*:fail_at_once failed: ValueError: no score"
    ):  # by transformers
        reinforce_adapter(packed, base, change(SPEC, failing), store, lambda record: None)
    assert re.search(says, caplog.text) and "transformers generates, several times slower" in caplog.text
