"""The verb: one artifact for one question, what it refuses before a model is loaded, and a judge that goes away."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.errors import MissingError, SpecError, TransientError
from tasks.pictures import reward_curves, reward_histograms
from tasks.reinforce.run import check_reinforcement, reinforce_adapter
from tasks.reinforce.streams import read_rows
from tasks.specs import LoraSpec, ReinforceSpec, RewardSpec, change
from tests.tasks.reinforce import runs
from tests.tasks.reinforce.judge_server import judging

pytestmark = pytest.mark.long

SHORT = runs.SPEC.model_copy(update={"max_steps": 3, "rows_per_device": 16})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def parts(store: ArtifactStore) -> tuple[PackedDataset, BaseCheckpoint]:
    return runs.make_artifacts(store, store.root / "sources")


@pytest.fixture(scope="module")
def adapter(store: ArtifactStore, parts: tuple[PackedDataset, BaseCheckpoint]) -> TrainedAdapter:
    return reinforce_adapter(*parts, SHORT, store, lambda record: None)


def test_the_artifact_tells_the_run_and_is_made_once(store: ArtifactStore, parts: Any, adapter: TrainedAdapter):
    seen: list[dict[str, Any]] = []
    assert reinforce_adapter(*parts, SHORT, store, seen.append) == adapter and not seen
    assert adapter.parents == (parts[0].ref, parts[1].ref) and adapter.num_steps == 3
    manifest = store.manifest(TrainedAdapter, adapter.key)
    assert manifest and {"metrics.csv", "generations.csv", "adapter/adapter_model.safetensors"} <= set(
        manifest["files"]
    )
    found = manifest["about"]["rewards"]
    values = [float(row["digits"]) for row in read_rows(adapter.path / "generations.csv")]
    assert found["digits"]["count"] == len(values) == manifest["about"]["num_completions"] == 48
    assert found["digits"]["mean"] == pytest.approx(sum(values) / 48) and sum(found["digits"]["counts"]) == 48
    assert not (adapter.path / "checkpoints").exists()
    records = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    for picture in (reward_curves(records, ["digits", "length"], "run"), reward_histograms(found, "run")):
        assert picture.startswith(b"\x89PNG")


def test_another_adapter_is_gone_on_from(store: ArtifactStore, parts: Any, adapter: TrainedAdapter):
    further = reinforce_adapter(*parts, SHORT, store, lambda record: None, start=adapter)
    assert further.key != adapter.key and adapter.ref in further.parents
    first, last = (read_rows(each.path / "metrics.csv")[at] for each, at in ((further, 0), (adapter, -1)))
    assert float(first["adapter_change"]) >= 0.9 * float(last["adapter_change"]) > 0
    # that of the base, as verify reckons
    assert further.validation_loss_before == pytest.approx(adapter.validation_loss_before, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta": 0.1}, "beta = 0.1 with adapter .*: TRL would measure the KL from the base"),
        ({"lora": {"rank": 4}}, "has r = 2 but ReinforceSpec.lora gives 4"),
        ({"lora": {"target_modules": ("q_proj",)}}, "has target_modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(parts: Any, adapter: TrainedAdapter, changes: Any, says: str):
    with pytest.raises(SpecError, match=says):
        check_reinforcement(parts[1], change(SHORT, changes), adapter)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"max_sequence_tokens": 9999}, SpecError, "9999 but the base's context is 512"),
        ({"attention": "sdpa"}, SpecError, "drops the sinks"),
        ({"rewards": [{"name": "exakt"}]}, SpecError, "no reward 'exakt'"),
        ({"rewards": [{"name": "number", "arguments": {"part": 1}}]}, SpecError, "takes no argument 'part'"),
        ({"rewards": [{"name": "format"}]}, SpecError, "needs a pattern"),
        ({"lora": {"target_modules": ("q_prj",)}}, SpecError, "'q_prj' hits nothing"),
        (
            {"rollouts": "vllm"},
            MissingError,
            "no vLLM beside the trainer nor at /nowhere/python .*choose 'transformers'",
        ),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    parts: Any, changes: Any, error: Any, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TATARA_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(error, match=says):
        check_reinforcement(parts[1], change(SHORT, changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_generations": 3}, "expected a multiple of num_generations=3"),
        ({"num_iterations": 3}, "save_steps=2 must be a multiple of num_iterations=3"),
        ({"max_kl": 0.5}, "needs the KL to be measured"),
        ({"rewards": [{"name": "exact"}, {"name": "exact"}]}, "two rewards are called 'exact'"),
        ({"metrics_csv": "../m.csv"}, "no folders"),
        ({"max_completion_tokens": 128}, "leaves no room for a prompt"),
    ],
)
def test_a_spec_that_does_not_fit_itself_is_refused(changes: Any, says: str):
    with pytest.raises(SpecError, match=says):
        change(runs.SPEC, changes)


@pytest.mark.slow
def test_a_judge_that_goes_away_costs_no_step_and_changes_nothing(parts: Any, tmp_path: Path):
    """The run ends with a checkpoint of its last whole step, random generators included."""

    def learn(home: str, url: str) -> TrainedAdapter:
        arguments = {"url": url, "model": "m", "tries": 2, "pause_s": 0.01, "concurrency": 1}
        reward = RewardSpec(name="judge", arguments=arguments, weight=0.1)
        spec = SHORT.model_copy(
            update={"max_steps": 5, "save_steps": 100, "rewards": (*SHORT.rewards, reward), "rows_per_device": 8}
        )
        return reinforce_adapter(*parts, spec, ArtifactStore(tmp_path / home), lambda record: None)

    with judging((200, "5")) as server:
        whole = learn("whole", server.url)
        server.replies = [*[(200, "5")] * 24, (503, "away")]  # three steps of eight completions
        with pytest.raises(TransientError, match=r"no score in 2 tries \(last: HTTP 503\)"):
            learn("away", server.url)
        [folder] = (tmp_path / "away" / "adapter").glob("[0-9a-f]*")
        assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
        server.replies = [(200, "5")]
        again = learn("away", server.url)
    assert "resuming from checkpoint-3" in (folder / "output.log").read_text()
    # Not the folder's digest: PEFT writes target_modules in the order of a set.
    weights = [(each.path / "adapter" / "adapter_model.safetensors").read_bytes() for each in (again, whole)]
    assert weights[0] == weights[1]
    assert (again.path / "generations.csv").read_bytes() == (whole.path / "generations.csv").read_bytes()


def test_a_colocated_engine_is_sent_what_peft_would_merge():
    """Whole modules around each adapter, by the base's names for linear layers and in vLLM's layout for experts."""
    import torch
    from peft import get_peft_model

    from tasks.adapters import lora_config
    from tasks.reinforce.vllm_engine import expert_weights, linear_weights
    from tests.tiny import make_model

    lora = LoraSpec(rank=2, alpha=4, target_modules=("q_proj", "o_proj"), target_parameters=runs.LORA.target_parameters)
    base = {name: weight.clone() for name, weight in make_model().named_parameters()}
    model: Any = get_peft_model(make_model(), lora_config(lora))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" not in name}
    linear, experts = dict(linear_weights(model)), dict(expert_weights(model))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())  # the base stays as it was
    merged = dict(model.merge_and_unload().named_parameters())
    sent = dict(linear)
    for name, parts in experts.items():
        sent |= {
            f"{name}.gate_up_proj": parts["w13_weight"].transpose(1, 2),
            f"{name}.gate_up_proj_bias": parts["w13_bias"],
            f"{name}.down_proj": parts["w2_weight"].transpose(1, 2),
            f"{name}.down_proj_bias": parts["w2_bias"],
        }
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert len(changed) == 2 * 4 and changed < set(sent)
    assert set(linear) == {name for name in base if ".self_attn." in name and not name.endswith("sinks")}
    assert all(torch.allclose(sent[name], merged[name], atol=1e-6) for name in sent)


def test_vllm_is_told_every_end_and_its_tokens_are_weighed_one_by_one(tmp_path: Path):
    """It knows the ends of the base's folder, and would go on behind harmony's where the tokenizer has another.

    In bfloat16 a token's ratio to vLLM's is off by a tenth: the product of them leaves nothing of a long completion.
    """
    from tasks.reinforce.prompts import Prompt
    from tasks.reinforce.worker import end_tokens, trainer_arguments
    from tests.tiny import byte_tokenizer, make_model

    tokenizer, model = byte_tokenizer(), make_model()
    tokenizer.eos_token = "<|end|>"
    model.generation_config.eos_token_id = 256
    asked = Prompt(ids=(1, 2), question="1+1=?", answer="2")
    spec = change(SHORT, {"rollouts": "vllm", "vllm_memory_share": 0.1})
    arguments = trainer_arguments(tmp_path, spec, [asked], end_tokens(model, tokenizer))
    assert arguments.generation_kwargs == {"stop_token_ids": [256, 257]}
    assert arguments.vllm_importance_sampling_mode == "token_truncate"


def test_the_defaults_are_the_seeds():
    spec = ReinforceSpec()
    assert (spec.max_sequence_tokens, spec.num_generations, spec.rows_per_device, spec.gradient_accumulation) == (
        5000, 4, 1, 8,
    )  # fmt: skip
    assert (spec.learning_rate, spec.quantization, spec.dtype, spec.device_map) == (5e-5, "nf4", "bfloat16", "auto")
    assert spec.lora.target_parameters == tuple(
        f"{layer}.mlp.experts.{name}" for layer in (7, 15, 23) for name in ("gate_up_proj", "down_proj")
    )
