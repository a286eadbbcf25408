"""How a PretrainSpec is run: kernels, Trainer's settings, and what memory it takes, said before it starts.

Ring: pure.  Units: bytes.
"""

from math import prod
from pathlib import Path
from typing import Any

from tasks.costs import HEAD_ROWS
from tasks.errors import SpecError
from tasks.gptoss.layout import parameter_shapes
from tasks.specs import PretrainSpec

EXPERTS = "experts.jsonl"  # {"step", "usage": [[share of each expert] of each layer]}, beside metrics.jsonl
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}


def uses_fused_kernels(spec: PretrainSpec) -> bool:
    """Say whether our kernels run below the model; the compact vocabulary has a loss of its own."""
    return spec.kernels != "stock" and not spec.compact_vocabulary


def choose_attention(spec: PretrainSpec, *, on_gpu: bool) -> str:
    """Return the attention: `flash` is tasks/gptoss/attention.py, every other name is transformers'.

    Raises: SpecError for kernels that the dtype or the vocabulary has none of.
    """
    if spec.kernels == "fused" and (spec.compact_vocabulary or (on_gpu and spec.dtype != "bfloat16")):
        raise SpecError(
            f"PretrainSpec.kernels = 'fused' needs dtype bfloat16 on a GPU and compact_vocabulary off, but they are "
            f"{spec.dtype} and {spec.compact_vocabulary}: change them, or use kernels='auto'"
        )
    if spec.kernels == "fused" or (uses_fused_kernels(spec) and on_gpu and spec.dtype == "bfloat16"):
        return "flash"
    # flex attention over packed documents of any length does not compile (torch 2.11)
    return "flex_attention" if on_gpu and spec.rows == "windows" else "eager"


def accumulated_passes(spec: PretrainSpec) -> tuple[int, int]:
    """Return the rows of one pass on a device, and how many passes are a step.

    >>> from flows.recipes import resolve_pretrain
    >>> accumulated_passes(resolve_pretrain("tiny", {"rows_per_device": 2, "num_processes": 2}))
    (2, 2)
    """
    rows = spec.rows_per_device or spec.rows_per_step // spec.num_processes
    return rows, spec.rows_per_step // (rows * spec.num_processes)


def trainer_settings(spec: PretrainSpec, folder: Path, *, on_gpu: bool) -> dict[str, Any]:  # Any: many types
    """Return the arguments of transformers' TrainingArguments; Adam's betas as GPT-3 and its heirs."""
    rows, accumulation = accumulated_passes(spec)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": spec.num_steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.lr_scheduler,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "adam_beta2": 0.95,
        "optim": _OPTIMIZERS[spec.optimizer],
        "gradient_checkpointing": spec.checkpointing == "full",
        "save_steps": spec.save_steps,
        "eval_strategy": "steps" if spec.eval_steps else "no",
        "eval_steps": spec.eval_steps or None,
        "per_device_eval_batch_size": rows,
        "prediction_loss_only": True,
        "logging_steps": spec.log_steps or max(1, spec.num_steps // 40),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "seed": spec.seed,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False if spec.num_processes > 1 else None,
    }
    if spec.checkpointing == "full":
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return settings


def pretraining_needs(spec: PretrainSpec) -> dict[str, int]:
    """Return what a process holds at its widest moment, by part; within 15 % of what was measured on an H200.

    Weights, gradients, moments and what bfloat16 weights lack of their masters are shared out by FSDP2. Kept for the
    backward pass of a layer: the inputs of both norms and of the experts, q, k, v, the attention's output, and for each
    of K experts the gate's argument (2 F), which `selective` makes again. Gradients come while those go, so the larger
    of the two counts; both do where gradients outlive a pass: in DDP's buckets, and when a step has several passes.
    """
    shape, element = spec.shape, 4 if spec.dtype == "float32" else 2
    num_weights = sum(prod(size) for size in parameter_shapes(shape).values())
    table = shape.vocab_size * shape.hidden_size
    moments = {
        "adamw": 8 * num_weights,
        "adamw_8bit": 2 * num_weights + 6 * table,  # bitsandbytes leaves the embedding's in float32
        "adafactor": 4 * num_weights // 100,
    }[spec.optimizer]
    parts = spec.num_processes if spec.parallel == "fsdp2" else 1
    rows, num_passes = accumulated_passes(spec)
    tokens = rows * spec.row_tokens
    hidden, inner, chosen = shape.hidden_size, shape.intermediate_size, shape.experts_per_token
    heads = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    plain = tokens * element * (3 * hidden + heads)
    gate = tokens * chosen * 2 * inner * element
    inside = tokens * chosen * (3 * hidden + 5 * inner) * element
    if not uses_fused_kernels(spec):
        gate += inside
    kept = {
        "none": shape.num_layers * (plain + gate),
        "selective": shape.num_layers * plain + gate,
        "full": shape.num_layers * tokens * hidden * element + plain + gate,
    }[spec.checkpointing]
    gradients = element * num_weights // parts
    if num_passes == 1 and (spec.num_processes == 1 or spec.parallel == "fsdp2"):
        gradients, kept = (gradients, 0) if gradients > kept else (0, kept)
    return {
        "weights": element * num_weights // parts,
        "gradients": gradients,
        "optimizer": moments // parts,
        "masters": (0 if element == 4 else 2 * num_weights) // parts,
        "activations": kept,
        "workspace": inside + shape.num_experts * 3 * hidden * inner * element,
        "logits": 2 * element * min(tokens, HEAD_ROWS) * shape.vocab_size,
    }
