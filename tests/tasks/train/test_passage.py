"""Which layers rest, from which files they are read, and that they rest again whatever happens in a pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.adapters import load_base, require_text
from tasks.errors import SpecError
from tasks.gptoss.mxfp4 import dequantize
from tasks.gptoss.packed import load_packed
from tasks.train.offload import Passage, find_resting
from tasks.train.sharding import find_layers
from tests.tiny import make_model, save_model
from tests.tiny_mxfp4 import pack_experts

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def packed_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack_experts(save_model(folder / "base"), folder / "mxfp4")
    return folder / "mxfp4"


def apart(weights: dict[str, torch.Tensor], folder: Path) -> set[str]:
    """Store the blocks in one file and their scales in another, as a shard's end may part them."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        files.setdefault(f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors", {})[name] = weight
    places = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    for file, content in files.items():
        save_file(content, folder / file, {"format": "pt"})
    return {"gate_up_proj", "down_proj"}


def partly(weights: dict[str, torch.Tensor], folder: Path) -> set[str]:
    """Store one of the layer's experts as it is used."""
    stem = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = weights.pop(f"{stem}_blocks"), weights.pop(f"{stem}_scales")
    save_file({**weights, stem: dequantize(blocks, scales, torch.float32).contiguous()}, folder / "model.safetensors")
    return {"gate_up_proj"}


@pytest.mark.parametrize("store", [apart, partly])
@torch.no_grad()
def test_a_base_is_read_as_transformers_reads_it_however_its_experts_are_stored(
    packed_base: Path, tmp_path: Path, store: Any
):
    for path in packed_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = store(load_file(packed_base / "model.safetensors"), tmp_path)
    model = load_packed(tmp_path, 1, attention="eager", dtype=torch.float32).requires_grad_(False)
    layers = list(model.model.layers)
    assert set(layers[0].mlp.experts.packed) == expected and not hasattr(layers[1].mlp.experts, "packed")
    Passage(layers[:1], torch.device("cpu"))
    whole = load_base(tmp_path, attention="eager", dtype="float32")
    assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)


@torch.no_grad()
def test_a_layer_rests_again_after_a_pass_that_failed_and_the_next_one_is_right():
    model = make_model().requires_grad_(False)
    expected, layers = model(input_ids=IDS).logits, list(model.model.layers)
    passage = Passage(layers, torch.device("cpu"))
    assert passage.num_bytes > 2 * 4 * 3 * 32 * 32 * 4
    buffers = [range(buffer.data_ptr(), buffer.data_ptr() + buffer.numel()) for buffer in passage._buffers]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for this product")

    broken = layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=IDS)
    broken.remove()
    for layer, pages in zip(layers, buffers, strict=True):
        assert all(weight.data_ptr() in pages for weight in find_resting(layer))
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_the_layers_are_those_of_the_text_and_whole():
    """`_no_split_modules` names blocks of an encoder of images too, which come first, and of Mamba parts of a layer."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    seen = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14})
    )
    other = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    models: list[tuple[Any, str, nn.ModuleList]] = [
        (seen, "o_proj", seen.model.language_model.layers),
        (other, "in_proj", other.backbone.layers),
    ]
    for model, target, layers in models:
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
        assert find_layers(wrapped) == list(layers)
        require_text(wrapped)
    everywhere = get_peft_model(seen, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        SpecError, match=r"encoder of images or sound, first .*vision_tower\.encoder\.layers\.0\.self_attn"
    ):
        require_text(everywhere)


def test_each_weight_of_a_layer_in_nf4_leaves_the_gpu_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also the experts, which bitsandbytes leaves as they are: of a mixture nearly all of the base.

    Without a GPU nothing moves, but the same moves are asked for.
    """
    base, moved, move = save_model(tmp_path), list[torch.Size](), torch.Tensor.cpu

    def cpu(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        moved.append(weight.shape)
        return move(weight, *args)

    settings: dict[str, Any] = {"attention": "eager", "dtype": "bfloat16", "quantization": "nf4"}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", cpu)
        model = load_base(base, **settings, num_offloaded=1)
    assert sorted(moved) == sorted(weight.shape for weight in model.model.layers[0].parameters())
    moved.clear()
    load_base(base, **settings)  # and the next load is as ever
    assert not moved
