"""A merge holds pieces, not tensors, let alone shards: peak resident memory of its process, as the kernel counts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.specs import GptOssShape
from tests.merging import ATTENTION, EXPERTS, write_adapter, write_base
from tests.tiny import SHAPE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
LARGEST_MB, LAYERS = 16, 12  # gate_up_proj (4, 1024, 2048) in bf16; all weights are one shard of 300 MB
WIDE = {"hidden_size": 1024, "intermediate_size": 1024, "num_layers": LAYERS}
CODE = """
import json, sys
from pathlib import Path
from tasks import files
from tasks.merge.plan import plan_merge
from tasks.merge.reader import Reader
from tasks.merge.run import write_model

def memory(name):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[name].split()[0]) / 1024

work, experts = Path(sys.argv[1]), sys.argv[2]
before = memory("VmRSS")
with Reader.opened(work / "base") as base, Reader.opened(work / "adapter") as deltas:
    config = files.read_json(work / "adapter/adapter_config.json")
    plan = plan_merge(base.headers, deltas.headers, config, dtype="BF16", experts=experts, shard_bytes=10**10)
    (work / experts / "model").mkdir(parents=True)
    ledger = write_model(plan, base, deltas, work / experts / "model")
print(json.dumps({"before": before, "peak": memory("VmHWM"), "shards": len(ledger["shards"])}))
"""


@pytest.mark.parametrize(("native", "experts"), [(False, "plain"), (True, "plain"), (False, "mxfp4")])
def test_peak_is_twice_the_largest_tensor_and_300_mb(tmp_path: Path, native: bool, experts: str):
    layers = LAYERS if (native, experts) == (False, "plain") else 2
    shape = GptOssShape.model_validate({**SHAPE.model_dump(), **WIDE, "num_layers": layers})
    write_base(tmp_path / "base", shape, mxfp4=native)
    write_adapter(tmp_path / "adapter", shape, target_modules=ATTENTION, target_parameters=EXPERTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", CODE, str(tmp_path), experts]
    found = json.loads(subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout)
    assert found["shards"] == 1
    assert found["peak"] <= 2 * LARGEST_MB + 300, found
    # torch alone is most of it. A whole expert in float32 is 8 MB, and of MXFP4 there are a few at a time.
    assert found["peak"] - found["before"] <= (60 if (native, experts) == (False, "plain") else 100), found
