"""What is said of a cluster before anything is downloaded or submitted; real Ray is in tests/ppo."""

import pytest
from huggingface_hub import HfApi

from flows.recipes import resolve_ppo
from tasks.artifacts import ArtifactStore
from tasks.check.ppo import check_ppo
from tasks.errors import CapacityError, MissingError, SpecError, TransientError
from tasks.ppo.cluster import find_address, find_python
from tasks.ppo.preflight import check_cluster
from tasks.specs import RaySpec
from tests import tiny
from tests.ports import free_port


def _recipe(address, **ppo):
    return resolve_ppo("tiny_ppo", {"ray": {"address": address}, "ppo": {"nnodes": 2, **ppo}})


def test_no_cluster_and_a_wrong_address_are_said():
    with pytest.raises(MissingError, match=r"no Ray cluster is named: set RaySpec\.address or RAY_ADDRESS"):
        find_address(RaySpec(), {})
    with pytest.raises(MissingError, match=r"RAY_ADDRESS is 10\.0\.0\.1:6379, expected .*http://10\.0\.0\.1:8265"):
        find_address(RaySpec(), {"RAY_ADDRESS": "10.0.0.1:6379"})
    assert find_address(RaySpec(address="http://a:1"), {"RAY_ADDRESS": "http://b:2"}) == "http://a:1"


def test_an_environment_that_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingError, match=r"make it with `python3 deployments/environments\.py ppo`"):
        find_python({"TATARA_PPO_PYTHON": str(tmp_path / "none")})


def test_a_cluster_without_gpus_is_refused_before_anything_is_downloaded(ray):
    with pytest.raises(
        CapacityError, match=r"needs 2 nodes with 1 GPU each, but the cluster .* has 2 nodes: one with 0 GPU"
    ):
        check_cluster(_recipe(ray.url), {})
    ray.gpus = 1
    assert check_cluster(_recipe(ray.url), {}).endswith("2 with 1 GPU or more")
    ray.alive = 1
    with pytest.raises(CapacityError, match="has 1 node: one with 1 GPU"):
        check_cluster(_recipe(ray.url), {})


def test_every_fault_of_a_recipe_is_in_one_error(ray, tmp_path, monkeypatch):
    recipe = resolve_ppo(
        "tiny_ppo",
        {
            "base": {"model": str(tmp_path / "no_model")},
            "questions": {"source": str(tmp_path / "no.jsonl")},
            "ray": {"address": ray.url},
            "ppo": {"nnodes": 2},
            "until": "publish",
        },
    )
    store = ArtifactStore(tmp_path / "home")
    with pytest.raises(SpecError) as caught:
        check_ppo(recipe, store, HfApi(token=False))
    assert str(caught.value).startswith("3 faults: ")
    ray.gpus = 1
    fine = recipe.model_copy(
        update={
            "base": recipe.base.model_copy(update={"model": str(tiny.save_dense_model(tmp_path / "model"))}),
            "questions": _recipe(ray.url).questions,
        }
    )
    assert [line.partition(":")[0] for line in check_ppo(fine, store, HfApi(token=False))] == [
        "questions",
        "base",
        "cluster",
        "publish",
        "serve",
        "disk",
    ]


def test_what_comes_after_the_model_is_looked_at_before_the_run(ray, tmp_path):
    """Hours later it would be the same fault."""
    ray.gpus = 1
    changes = {
        "base": {"model": str(tiny.save_dense_model(tmp_path / "model"))},
        "ray": {"address": ray.url},
        "ppo": {"max_prompt_length": 256},
        "publish": {"what": "adapter"},
        "serve": {"max_model_len": 200, "host": "127.0.0.1"},
    }
    store, hub, nobody = ArtifactStore(tmp_path / "home"), HfApi(token=False), {"TATARA_VLLM_PYTHON": "/nowhere/python"}
    with pytest.raises(SpecError) as caught:
        check_ppo(resolve_ppo("tiny_ppo", changes), store, hub, nobody)
    for said in (
        "3 faults: ",
        "PublishSpec.what = 'adapter', but a model that is trained as a whole has no adapter",
        "ServeSpec.max_model_len = 200, but verify asks for questions of 256 tokens",
        "vLLM's environment is not there (/nowhere/python)",
    ):
        assert said in str(caught.value)
    ports = {"vllm_port": free_port(), "gateway_port": free_port()}
    longer = {**changes, "publish": {}, "serve": {"max_model_len": 4096, **ports}}
    with pytest.raises(SpecError, match=r"max_model_len = 4096 but the base's context is 512"):
        check_ppo(resolve_ppo("tiny_ppo", {**longer}), store, hub, {"TATARA_VLLM_PYTHON": __file__})
    said = check_ppo(resolve_ppo("tiny_ppo", {**longer, "until": "publish"}), store, hub, nobody)
    assert "serve: not asked for" in said


def test_a_cluster_that_is_away_is_asked_again():
    with pytest.raises(TransientError):
        check_cluster(_recipe(f"http://127.0.0.1:{free_port()}"), {})
