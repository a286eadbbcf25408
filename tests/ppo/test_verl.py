"""verl's own main_ppo on two local raylets, through the flow's code: a tiny dense model, shipped questions, the CPU.

With the plug-in of verl_cpu.py, which says what of it is ours. Minutes, nearly all of them imports.
"""

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from flows.recipes import resolve_ppo
from tasks import files
from tasks.artifacts import ArtifactStore, ReinforcedModel
from tasks.fetch.run import fetch_base
from tasks.metrics import read_metrics
from tasks.ppo import run
from tasks.ppo.preflight import find_begun
from tasks.ppo.prepare import prepare_questions
from tasks.publish.run import publish_model
from tasks.serve.weights import require_merged_files
from tasks.specs import BaseModelSpec, PublishSpec
from tests import tiny
from tests.hub_server import WRITE, hub_fixture  # noqa: F401  (the fixture `hub`)
from tests.ppo.conftest import PYTHON, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
PLUG_IN = {
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # the engines that verl has registered for cuda
    "PYTHONPATH": str(ROOT / "tests" / "ppo"),
    "OMP_NUM_THREADS": "1",
}
FOR_A_CPU = (
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "data.dataloader_num_workers=0",
    *(f"{role}.model.use_remove_padding=false" for role in ("actor_rollout_ref", "critic")),
    *(f"{role}.model.enable_gradient_checkpointing=false" for role in ("actor_rollout_ref", "critic")),
    *(f"{part}.use_torch_compile=false" for part in ("actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config")),
    "critic.fsdp.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    "critic.fsdp.dtype=float32",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "critic.strategy=fsdp2",
)


def _recipe(**changes):
    ray = {"local_nodes": 2, "local_gpus": 1, "poll_s": 0.5}  # a GPU by name only: verl wants to count some
    return resolve_ppo("tiny_ppo", {"ray": ray, "ppo": {"nnodes": 2, "device": "cpu", "attention": "eager", **changes}})


@pytest.fixture
def line(tmp_path):
    """A store with a tiny base and the shipped questions in it."""
    store, hub = ArtifactStore(tmp_path / "home"), HfApi(token=False)
    base = fetch_base(BaseModelSpec(model=str(tiny.save_dense_model(tmp_path / "base"))), store, hub)
    return store, base, prepare_questions(_recipe().questions, store, hub)


class StopError(Exception):
    """What ends the first run: an error of ours, after which the job must not run on."""


def test_main_ppo_trains_goes_on_from_its_checkpoint_becomes_a_model_and_is_published(line, hub):
    store, base, questions = line
    # no reference model: verl offloads it with pin_memory, which needs a device
    recipe = _recipe(rollout="transformers", kl_in_reward=False, environment=PLUG_IN, overrides=FOR_A_CPU)
    variables = {**os.environ, "TATARA_PPO_PYTHON": str(PYTHON)}

    def stop_at_three(record):
        if record["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        run.reinforce_model(questions, base, recipe, store, stop_at_three, variables)
    seen = []
    model = run.reinforce_model(questions, base, recipe, store, seen.append, variables)
    records = read_metrics(model.path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["attempt"] for record in records] == [1, 1, 1, 2, 2]  # verl saved step 2
    assert all("critic/vf_loss" in record["verl"] and "actor/pg_loss" in record["verl"] for record in records[1:])
    assert all("reward" in record for record in records[1:])
    assert (model.num_steps, model.base_digest) == (4, base.model_digest)
    assert model.test_score_before is not None and model.test_score_after is not None
    _is_a_trained_model(model, base)
    assert run.reinforce_model(questions, base, recipe, store, seen.append, variables) == model  # found, not made
    assert find_begun(recipe, questions, base, store, {}) == f"cluster: not needed, reinforced/{model.short} is whole"
    _is_published(model, store, hub)


def _is_published(model, store, hub):
    published = publish_model(model, PublishSpec(repo_id="ada/ppo"), store, HfApi(endpoint=hub.url, token=WRITE))
    held, folder = hub.content("model", "ada/ppo"), Path(model.model_folder)
    assert {name: (folder / name).read_bytes() for name in files.list_files(folder)}.items() <= held.items()
    card = held["README.md"].decode()
    assert model.model_digest in card and model.base_digest in card and "| steps | 4 of 8 questions" in card
    assert "| verl | `0.9.1` |" in card and "| ray | `2.60.0` |" in card
    assert held["reward_curve.png"].startswith(b"\x89PNG")
    require_merged_files(published, store)  # what would be served is what verl's merger wrote


def _is_a_trained_model(model, base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(model.model_folder, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(base.model_folder, dtype=torch.float32).state_dict()
    moved = {name: (value - before[name]).abs().max().item() for name, value in trained.state_dict().items()}
    assert set(moved) == set(before) and 0 < max(moved.values()) < 1e-3
    assert AutoTokenizer.from_pretrained(model.model_folder)("abc").input_ids
    assert not (model.path / "checkpoints").exists()
    manifest = files.read_json(model.path / "manifest.json")
    assert "verl.trainer.main_ppo" in manifest["about"]["command"]
    assert isinstance(model, ReinforcedModel)
