"""Wrong weights behind a real vLLM and gateway: every one of them is refused, and taken away from clients.

Chaos (vLLM starts once for each, 25 to 40 s on two CPU cores). What can be told from the files is tested in
tests/tasks/serve/test_weights.py, the checks themselves in tests/tasks/verify/test_sabotage.py; the base under
the new name and a stale tokenizer in test_line_killed.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from flows.recipes import resolve
from tasks.artifacts import ArtifactStore, HealthReport, PublishedModel, TrainedAdapter
from tasks.errors import AttestationError
from tasks.publish.run import publish_model
from tasks.serve import services
from tasks.serve.run import serve_model
from tasks.serve.settings import ServiceSettings
from tasks.specs import Recipe, change
from tasks.verify.run import verify_model
from tests.flows.line import changes_of_tiny, make_base_folder, need_vllm, run_to_merge, serve_unchecked
from tests.ports import free_port
from tests.tasks.verify import sabotage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Deploy:
    """A published tune, its base, and another tune of that base."""

    store: ArtifactStore
    recipe: Recipe
    published: PublishedModel
    base_folder: Path
    other_folder: Path


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory, harmony_tokenizer: Path) -> Iterator[Deploy]:
    need_vllm()
    folder = tmp_path_factory.mktemp("sabotage")
    base = make_base_folder(folder / "base", harmony_tokenizer)
    recipe = change(resolve("tiny"), changes_of_tiny(base, free_port(), free_port()))
    store = ArtifactStore(folder / "home")
    merged = run_to_merge(recipe, store)
    other = run_to_merge(change(recipe, {"train": {"seed": 7}}), store)
    published = publish_model(merged, recipe.publish, store, HfApi(token=False))
    base_folder = Path(store.ancestor(merged, TrainedAdapter).base_folder)
    try:
        yield Deploy(store, recipe, published, base_folder, Path(other.model_folder))
    finally:
        services.stop(ServiceSettings(model=str(base), spec=recipe.serve, home=folder / "home"))


def test_the_published_model_passes(deploy: Deploy):
    served = serve_model(deploy.published, deploy.recipe.serve, deploy.store)
    report = verify_model(served, deploy.recipe.verify, deploy.store, lambda report, about: None)
    assert report.passed and report.adapter_gap < 0.01 and report.num_greedy_tokens > 0


def _other_adapter(deploy: Deploy, target: Path) -> Path:
    return deploy.other_folder


def _wreck(wreck: Callable[[Path, Path, Path], Path]) -> Callable[[Deploy, Path], Path]:
    return lambda deploy, target: wreck(Path(deploy.published.model_folder), deploy.base_folder, target)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_wreck(sabotage.experts_dropped), id="experts-dropped"),
        pytest.param(_wreck(sabotage.gate_up_swapped), id="gate-up-swapped"),
        pytest.param(_wreck(sabotage.delta_twice), id="delta-twice"),
        pytest.param(_other_adapter, id="wrong-adapter"),
    ],
)
def test_a_deploy_of_wrong_weights_fails(deploy: Deploy, tmp_path: Path, make: Callable[[Deploy, Path], Path]):
    folder = make(deploy, tmp_path / "served")
    served = serve_unchecked(deploy.published, folder, deploy.recipe.serve, deploy.store)
    with pytest.raises(AttestationError, match="the served model is not the merged one"):
        verify_model(served, deploy.recipe.verify, deploy.store, lambda report, about: None)
    assert deploy.store.committed(HealthReport)[-1].passed is False
