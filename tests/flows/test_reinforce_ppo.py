"""The flow `reinforce-ppo` behind its training, with real vLLM: a model that is whole is published, served and proven.

No Ray: the model is there already, so that the flow needs no cluster. verl's part is in tests/ppo.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.recipes import resolve_ppo
from tasks.artifacts import ArtifactStore, HealthReport, PublishedModel, ReinforcedModel, ServedModel
from tasks.errors import AttestationError
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import PpoRecipe
from tasks.verify.run import verify_model
from tests.flows.line import ROOT, need_vllm, serve_unchecked
from tests.ports import free_port
from tests.reinforced import LENGTHS, make_reinforced, save_moved

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
_RUN = """
import json, sys
from prefect.testing.utilities import prefect_test_harness
from flows.reinforce_ppo import reinforce_ppo
from flows.release_ppo import release_ppo
changes = json.loads(sys.argv[1])
with prefect_test_harness(server_startup_timeout=120):
    published = reinforce_ppo("tiny_ppo", {**changes, "until": "publish"})
    print("ONLY", type(published).__name__)
    print("THEN", reinforce_ppo("tiny_ppo", changes).passed, release_ppo("tiny_ppo", "latest", changes).passed)
"""


@dataclass(frozen=True)
class Released:
    """A store with a model that went through the flows, and the recipe."""

    store: ArtifactStore
    model: ReinforcedModel
    recipe: PpoRecipe
    said: str


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    need_vllm()
    folder = tmp_path_factory.mktemp("ppo")
    store = ArtifactStore(folder / "home")
    serve = {"vllm_port": free_port(), "gateway_port": free_port(), "max_model_len": 512, "dtype": "float32"}
    changes = {
        "base": {"model": str(folder / "base")},
        "ppo": LENGTHS,
        "serve": {**serve, "cpu_kv_cache_bytes": 64 << 20},
        "verify": {"num_answers": 4, "max_answer_tokens": 16, "may_break_format": True, "may_equal_base": False},
    }
    recipe, model = make_reinforced(store, folder / "base", resolve_ppo("tiny_ppo", changes))
    env = {**os.environ, "TATARA_HOME": str(store.root), "FILE_QUEUE_PATH": str(folder / "traces.jsonl")}
    env |= {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    try:
        command = [sys.executable, "-c", _RUN, json.dumps(changes)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        yield Released(store, model, recipe, done.stdout + done.stderr)
    finally:
        services.stop(ServiceSettings(model="", spec=recipe.serve, home=store.root))


def test_the_run_ends_where_it_was_told_to_and_goes_on_in_another(released: Released):
    assert "ONLY PublishedModel" in released.said and "THEN True True" in released.said
    assert len(released.store.committed(PublishedModel)) == 1 and len(released.store.committed(ServedModel)) == 2


def test_the_endpoint_is_the_files_and_not_the_base(released: Released):
    report = released.store.committed(HealthReport)[0]
    assert report.passed and report.num_answers == 4 and report.num_greedy_tokens > 0
    assert abs(report.served_logprob - report.merged_logprob) < 1e-3
    assert report.token_gap < 0.05 * report.tuning_gap
    about = (released.store.manifest(HealthReport, report.key) or {})["about"]
    assert about["reinforced"] == released.model.origin and about["doubt"] == ""
    assert about["test_scores"] == [0.0, 0.25]


def test_the_base_and_other_weights_in_its_place_are_refused(released: Released, tmp_path: Path):
    """Served by a deploy that does not look at the files."""
    [published], spec = released.store.committed(PublishedModel), released.recipe
    base = Path(released.model.base_folder)
    for folder in (base, save_moved(base, tmp_path / "other", 20, seed=2)):
        served = serve_unchecked(published, folder, spec.serve, released.store)
        with pytest.raises(AttestationError, match="the served model is not the merged one"):
            verify_model(served, spec.verify, released.store, lambda report, about: None)
