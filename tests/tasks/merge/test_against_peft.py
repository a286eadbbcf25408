"""What is merged is what PEFT merges: nothing differs in float32, in bf16 only by the rounding that PEFT does more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks import files
from tasks.errors import SpecError
from tasks.gptoss.mxfp4 import dequantize
from tasks.merge.run import merge_folders
from tasks.models import dequantized
from tasks.specs import MergeSpec
from tests.merging import ATTENTION, EXPERTS, stream, write_adapter, write_base
from tests.tiny import SHAPE

PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"mlp.experts.down_proj": 3, r"0\.self_attn\.q_proj": 5},
    "alpha_pattern": {"gate_up_proj": 12, "o_proj": 7},
    "target_parameters": [*EXPERTS, "mlp.router.weight"],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "down-of-one-layer": {"target_parameters": ["1.mlp.experts.down_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "patterns": {"target_modules": ["q_proj", "o_proj"], **PATTERNS},
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::UserWarning")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float32_no_element_differs(tmp_path: Path, layout: str):
    base = write_base(tmp_path / "base", SHAPE, torch.float32, shard_bytes=60_000)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, **LAYOUTS[layout])
    stream(base, adapter, tmp_path / "merged", dtype="float32", shard_bytes=1_000_000)
    ours, theirs, before = _weights(tmp_path / "merged"), _by_peft(base, adapter, torch.float32), _weights(base)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == len(load_file(adapter / "adapter_model.safetensors")) // 2  # none was dropped


@pytest.mark.parametrize("layout", ["both", "patterns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_bf16_a_sum_is_rounded_once(tmp_path: Path, layout: str, dtype: torch.dtype):
    """PEFT rounds an expert's delta to bf16 and then the sum; with that rounding put in, nothing differs."""
    base = write_base(tmp_path / "base", SHAPE, dtype)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, size=0.02, **LAYOUTS[layout])
    stream(base, adapter, tmp_path / "merged", shard_bytes=1_000_000)
    ours, exact, before = _weights(tmp_path / "merged"), _by_peft(base, adapter, torch.float32), _weights(base)
    assert {name for name in ours if not torch.equal(ours[name], exact[name].bfloat16())} == set()
    if dtype != torch.bfloat16:
        return
    theirs = _by_peft(base, adapter, torch.bfloat16)
    for name, mine in ours.items():
        delta = exact[name] - before[name].float()
        step = 2.0**-7 * (mine.float().abs() + delta.abs())  # one bf16 step of the sum, one of the delta
        assert bool(((mine.float() - theirs[name].float()).abs() <= step).all()), name
    linear = [name for name in ours if ours[name].ndim == 2 and "router" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in linear)  # of a Linear PEFT rounds once too


@pytest.mark.parametrize("layout", ["attention", "both"])
def test_a_native_mxfp4_base_is_merged_as_its_unpacked_one(tmp_path: Path, layout: str):
    base = write_base(tmp_path / "base", SHAPE, mxfp4=True, shard_bytes=30_000)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, **LAYOUTS[layout])
    stream(base, adapter, tmp_path / "merged", shard_bytes=1_000_000)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=dequantized({"quant_method": "mxfp4"})
    )
    theirs = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    ours = _weights(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name].bfloat16())} == set()


@pytest.mark.parametrize("native", [True, False])
def test_mxfp4_again_is_loaded_by_transformers_and_says_what_it_cost(tmp_path: Path, native: bool):
    base = write_base(tmp_path / "base", SHAPE, mxfp4=native)
    adapter = write_adapter(tmp_path / "adapter", SHAPE, target_parameters=["0.mlp.experts.gate_up_proj"])
    ledger = stream(base, adapter, tmp_path / "packed", experts="mxfp4", shard_bytes=1_000_000)
    stream(base, adapter, tmp_path / "plain", dtype="float32", shard_bytes=1_000_000)
    packed, plain, before = (_weights(tmp_path / name) for name in ("packed", "plain", "base"))
    parameters = {name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")}
    assert len(parameters) == 4
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    stored = files.read_json(tmp_path / "packed/config.json")["quantization_config"]
    assert (stored["quant_method"], "lm_head" in stored["modules_to_not_convert"]) == ("mxfp4", True)
    assert "quantization_config" not in files.read_json(tmp_path / "plain/config.json")
    state = opened.state_dict()
    for name in parameters:
        expected = dequantize(packed[f"{name}_blocks"], packed[f"{name}_scales"], torch.float32)
        assert torch.equal(state[name], expected), name
    touched = "model.layers.0.mlp.experts.gate_up_proj"
    [row] = [row for row in ledger["requantized"] if row["tensor"] == touched]
    assert len(ledger["requantized"]) == (1 if native else 4)
    error = ((state[touched] - plain[touched]).norm() / plain[touched].norm()).item()
    assert row["mxfp4_error"] == pytest.approx(error, rel=1e-3)
    assert 0.05 < row["mxfp4_error"] < 0.15
    assert 0.5 < row["change_kept"] < 1.5
    assert row["error_norm"] == pytest.approx((state[touched] - plain[touched]).norm().item(), rel=1e-3)
    if native:  # what was not touched is the same bytes
        names = [name for name in packed if not name.startswith(touched) or name.endswith("bias")]
        assert all(torch.equal(packed[name], before[name]) for name in names)
    tokens = torch.arange(12).reshape(1, 12)
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    unpacked.load_state_dict({name: state[name] for name in state})
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, unpacked(tokens).logits)


def test_a_quantised_base_of_another_kind_is_refused(tmp_path: Path):
    base = write_base(tmp_path / "base", SHAPE)
    config = files.read_json(base / "config.json")
    files.write_json(base / "config.json", {**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(SpecError, match="the base is stored as bitsandbytes: name its unquantised checkpoint"):
        merge_folders(base, tmp_path / "adapter", tmp_path / "out" / "model", MergeSpec())
