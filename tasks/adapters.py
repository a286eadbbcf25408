"""LoRA inside a trainer: the base is loaded, the adapter put on, saved whole, and shown to have moved.

    folder -> load_base() -> PreTrainedModel;   LoraSpec -> lora_config();   trainer -> save_adapter() -> adapter/

Ring: edge; runs inside a trainer process (no Prefect).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    core_model_loading,
)

from tasks import files
from tasks.errors import SpecError, TrainingError
from tasks.models import dequantized
from tasks.specs import LoraSpec
from tasks.targets import is_of_encoder, layer_number


def load_base(
    folder: Path,
    *,
    attention: str,
    dtype: str,
    quantization: str = "none",
    on_host: bool = False,
    num_offloaded: int = 0,
) -> PreTrainedModel:
    """Load a base for training, on its own GPU where there is one.

    Args:
        folder: in transformers' layout. MXFP4 is dequantised, since its blocks have no gradient.
        attention: transformers' name of it.
        dtype: of weights that are not quantised.
        quantization: none, nf4 or int8.
        on_host: stay there, to be shared out: as pages of its files where dtypes agree (ranks share them).
        num_offloaded: the lowest layers end there (tasks/train/offload.py): in nf4 each weight as soon as the GPU has
            made it, so that the GPU never holds them all; else the whole base stays.
    """
    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if quantization != "none":
        kwargs["quantization_config"] = bits_and_bytes(quantization, dtype)
    elif stored:
        kwargs["quantization_config"] = dequantized(stored)
    stays = on_host or (num_offloaded and quantization == "none")
    if torch.cuda.is_available() and not stays:
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with _lay_aside(num_offloaded if quantization == "nf4" else 0):
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    for module in model.modules():
        # On CPUs with AVX512-BF16 an evaluation packs 4-bit weights anew, in a layout that has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


@contextmanager
def _lay_aside(num_layers: int) -> Iterator[None]:
    """Let transformers move each weight of the lowest layers to the host as soon as it is made, quantised or not.

    It has no setting for that: a device map with layers on the host leaves those unquantised, and quantising them there
    is slow and rounds elsewhere. What belongs to a quantised weight beside its numbers stays on the GPU.
    """
    place = core_model_loading.set_param_for_module

    def place_aside(model: Any, name: str, weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:  # Any: its own
        layer = layer_number(name)
        if layer is not None and layer < num_layers:
            weight.data = weight.data.cpu()
        place(model, name, weight, *args, **kwargs)

    core_model_loading.set_param_for_module = place_aside
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = place


def bits_and_bytes(quantization: str, dtype: str) -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit (nf4, double quantisation) or LLM.int8()."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def lora_config(lora: LoraSpec) -> LoraConfig:
    """Return PEFT's config. An empty target_modules must be [] or PEFT picks a default."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        target_parameters=list(lora.target_parameters) or None,
    )


def require_text(model: Any) -> None:  # Any: a PeftModel; Trainer types it as optional
    """Raise SpecError when an adapter sits where rows of text don't come: it would stay as it is to the run's end."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if unreached := [name for name in trained if is_of_encoder(name)]:
        raise SpecError(
            f"{len(unreached)} of {len(trained)} adapter tensors sit in the base's encoder of images or sound, first "
            f"{unreached[0]}, and rows of text don't train them: name in LoraSpec.target_modules what only its text "
            "layers have, such as gate_proj, or choose a base of text alone"
        )


def widen_adapter(model: Any) -> None:  # Any: a PeftModel; Trainer types it as optional
    """Train a QLoRA adapter in float32, as on an unquantised base.

    TRL makes it bfloat16, into which a checkpoint's float32 weights would be rounded: a resumed run would be another
    one. Before the checkpoint is loaded and the optimizer made.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Write `adapter/` aside, check that every tensor is finite, rename it."""
    aside, target = folder / "adapter.tmp", folder / "adapter"
    shutil.rmtree(aside, ignore_errors=True)
    model: Any = trainer.model  # Any: Trainer types it as optional
    model.save_pretrained(str(aside))
    check_finite(load_file(str(aside / "adapter_model.safetensors")))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    files.fsync_folder(folder)


def remember_start(trainer: Trainer, path: Path) -> dict[str, str]:
    """Return the digest of each adapter tensor before its first step, kept across resumes."""
    if not path.exists():
        digests = _digest_adapter(trainer)
        if not trainer.is_world_process_zero():
            return digests
        files.write_json(path, digests)
    return files.read_json(path)


def require_moved(trainer: Trainer, start: dict[str, str], num_moving: int) -> None:
    """Raise TrainingError when a tensor is to the bit what it was before `num_moving` steps at a rate above 0.

    A has no gradient in the first of them, since B is zero.
    """
    now = _digest_adapter(trainer)
    expected = {name for name in now if num_moving > 1 or ".lora_B." in name}
    still = sorted(name for name in expected if now[name] == start.get(name))
    if still:
        raise TrainingError(
            f"{len(still)} of {len(now)} adapter tensors did not move ({', '.join(still[:3])}): their weights got no "
            "gradient, and the base would be served unchanged there"
        )


def _digest_adapter(trainer: Trainer) -> dict[str, str]:
    model: Any = trainer.model  # Any: Trainer types it as optional
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return {name: sha256(weight.detach().float().cpu().numpy().tobytes()).hexdigest() for name, weight in trained}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise TrainingError when a tensor is not finite, or there is none."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken or not tensors:
        first = broken[0] if broken else "the file is empty"
        raise TrainingError(f"{len(broken)} adapter tensors are not finite, first {first}: lower learning_rate")
