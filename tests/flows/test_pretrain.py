"""The flow `pretrain` under Prefect: a small model on the shipped sentences, and one that can't be made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, PretrainedModel

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_experts": 4, "experts_per_token": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2000}
SMALL = {"num_steps": 6, "save_steps": 3, "dtype": "float32", "optimizer": "adamw", "learning_rate": 3e-3}
SMALL |= {"warmup_steps": 1, "shape": SHAPE}
_RUN = """
import json, sys
from prefect.testing.utilities import prefect_test_harness
from flows.pretrain import pretrain
from tasks.errors import CapacityError

small = json.loads(sys.argv[1])
with prefect_test_harness(server_startup_timeout=120):
    model = pretrain("compact_1b4", small)
    assert pretrain("compact_1b4", small) == model
    huge = {**small, "seed": 1, "shape": {**small["shape"], "num_layers": 9000, "num_experts": 900}}
    try:
        pretrain("compact_1b4", huge)
    except CapacityError as error:
        print("REFUSED", error)
"""


def test_a_model_is_made_once_and_one_without_room_is_refused_before_its_corpus(tmp_path: Path):
    store = ArtifactStore(tmp_path / "home")
    env = {**os.environ, "TATARA_HOME": str(store.root), "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-c", _RUN, json.dumps(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=350)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REFUSED pretraining needs about" in done.stdout
    (model,) = store.committed(PretrainedModel)
    assert model.last_loss < model.first_loss - 0.2
    assert len(list((store.root / "corpus").glob("*/manifest.json"))) == 1
    assert not (model.path / "checkpoints").exists()
