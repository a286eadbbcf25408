"""What serves in the tests of promotion: a model called `old` behind the real gateway."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.serve import services
from tasks.serve.services import ServiceSettings
from tasks.specs import ServeSpec
from tests.ports import free_port
from tests.tasks.serve.stand_in import make_model, make_python


@pytest.fixture
def old(tmp_path: Path) -> Iterator[ServiceSettings]:
    """What serves: a model called `old` behind the real gateway."""
    ports = [free_port() for _ in range(3)]
    settings = ServiceSettings(
        model=str(make_model(tmp_path / "old", "old")),
        spec=ServeSpec(vllm_port=ports[0], gateway_port=ports[1], second_port=ports[2], start_timeout_s=20),
        home=tmp_path / "home",
        variables={"PATH": os.environ["PATH"], "FILE_QUEUE_PATH": str(tmp_path / "traces.jsonl")},
        vllm_python=make_python(tmp_path),
        ids={"TATARA_MODEL_DIGEST": "digest-old", "TATARA_RUN_ID": "r1"},
    )
    services.start(settings)
    yield settings
    services.stop(settings)
