"""Train a LoRA adapter with TRL's SFTTrainer on PEFT; knows no Prefect.

    python -m tasks.train.worker job.json           one process
    torchrun ... -m tasks.train.worker job.json     one per GPU

Packed rows come tokenised from tasks/pack; nothing here tokenises or shuffles documents.

Ring: edge.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils import logging as transformers_logging
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tasks import adapters, files
from tasks.adapters import lora_config, remember_start, require_moved, require_text, save_adapter, widen_adapter
from tasks.checkpoints import is_complete, latest_checkpoint
from tasks.gptoss.documents import separate_documents
from tasks.gptoss.embedding import rest_embedding
from tasks.gptoss.forward import factor_experts, flash_attention, fuse_norms, join_layers, lowest_trained
from tasks.gptoss.layout import MODEL_TYPE
from tasks.gptoss.packed import load_packed
from tasks.gptoss.product import Era
from tasks.models import require_mxfp4
from tasks.recorder import say
from tasks.specs import TrainSpec
from tasks.train.best import load_best, restore_best
from tasks.train.loss import FusedHeadTrainer, TokenMeanTrainer, fuse_head, has_plain_head
from tasks.train.needs import choose_attention, rests_embedding, uses_fused_kernels
from tasks.train.offload import let_rest
from tasks.train.plan import StepPlan
from tasks.train.sharding import HostConfig, share_base
from tasks.train.validation import evaluations, is_over
from tasks.train.watch import watch
from tasks.training import RESULT, fix_seeds, outcome, require_end, run_worker


def train(job: dict[str, Any]) -> None:  # Any: JSON values
    """Train, or go on from the newest whole checkpoint; leave `adapter/` and result.json."""
    folder, spec = Path(job["folder"]), TrainSpec.model_validate(job["spec"])
    transformers_logging.disable_progress_bar()
    fix_seeds(spec.seed, deterministic=spec.deterministic)
    model = load_base(Path(job["base_folder"]), spec, StepPlan(**job["plan"]).num_offloaded)
    trainer = make_trainer(model, job, spec)
    watch(trainer, job, spec)
    checkpoint = latest_checkpoint(folder / "checkpoints", is_owner=trainer.is_world_process_zero())
    start = remember_start(trainer, folder / "adapter_start.json")
    before = evaluate_once(trainer, folder / "evaluation_before.json")
    fix_seeds(spec.seed, deterministic=spec.deterministic)  # the rows' order must not depend on who evaluated, and how
    run_to_end(trainer, checkpoint, spec)
    best_step = load_best(trainer, spec)
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        num_moving = (best_step or trainer.state.global_step) - (spec.warmup_steps > 0)  # a warm-up begins at rate 0
        require_moved(trainer, start, num_moving)
        save_adapter(trainer, folder)
        say(f"validation loss {before:.4f} -> {after:.4f}")
        files.write_json(folder / RESULT, outcome(trainer, folder, before, after) | {"best_step": best_step})


def load_base(folder: Path, spec: TrainSpec, num_offloaded: int = 0) -> PreTrainedModel:
    """Load the base for training: dtype, attention and quantisation as the spec says."""
    on_gpu = torch.cuda.is_available()
    attention = choose_attention(AutoConfig.from_pretrained(folder).model_type, spec, on_gpu=on_gpu)
    if on_gpu and spec.parallel == "fsdp2":  # torchrun leaves one thread to each process: gpt-oss-20b for 13 minutes
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    loaded_with = "eager" if attention == "flash" else attention  # ours is put in its place by `speed_up`
    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if num_offloaded and stored and spec.quantization == "none":
        require_mxfp4(stored)
        model = load_packed(folder, num_offloaded, attention=loaded_with, dtype=getattr(torch, spec.dtype))
    else:
        model = adapters.load_base(
            folder,
            attention=loaded_with,
            dtype=spec.dtype,
            quantization=spec.quantization,
            on_host=spec.parallel == "fsdp2",
            num_offloaded=num_offloaded,
        )
    model.config.use_cache = False
    say(f"base: {model.num_parameters():,} parameters, attention {attention}")
    return model


def make_trainer(model: PreTrainedModel, job: dict[str, Any], spec: TrainSpec) -> TokenMeanTrainer:  # Any: JSON values
    """Put model, packed rows and settings together."""
    folder, packed = Path(job["folder"]), Path(job["packed_folder"])
    # As arrays: TRL's collator makes a tensor of an array in a tenth of the time that a list takes, and a GPU waits.
    rows = {
        name: Dataset.from_parquet(str(packed / f"{name}.parquet")).with_format("numpy")
        for name in ("train", "validation")
    }
    tokenizer = AutoTokenizer.from_pretrained(job["base_folder"])
    plan = StepPlan(**job["plan"])
    is_fused = uses_fused_kernels({"model_type": model.config.model_type}, spec)
    is_gpt_oss = model.config.model_type == MODEL_TYPE  # its head is plain; with packed experts it can't be asked
    is_head_fused = is_fused or (not torch.cuda.is_available() and (is_gpt_oss or has_plain_head(model)))
    end_backward_early(model)
    trainer_class = FusedHeadTrainer if is_head_fused else TokenMeanTrainer
    trainer = trainer_class(
        model=model,
        args=trainer_arguments(folder, spec, plan),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
    )
    trainer.remove_callback(PrinterCallback)
    require_text(trainer.model)
    widen_adapter(trainer.model)
    if plan.num_offloaded:
        let_rest(trainer, plan.num_offloaded)
        trainer.is_placed = True
    if is_head_fused:
        fuse_head(model)
    is_flash = is_fused and choose_attention(MODEL_TYPE, spec, on_gpu=torch.cuda.is_available()) == "flash"
    if is_fused:
        speed_up(trainer.model, spec, plan, trainer.era, is_flash=is_flash)
    trainer.is_flash = is_flash
    if not is_flash:
        separate_documents(model)
    if spec.parallel == "fsdp2":
        share_base(trainer)
        trainer.is_shared_out = trainer.is_placed = True
    return trainer


def end_backward_early(model: PreTrainedModel) -> None:
    """Let no gradient go below the lowest adapter.

    With checkpointing PEFT, TRL and Trainer each make the embeddings ask for one, which reentrant checkpoints need.
    Ours are not reentrant, and an adapter on the last layers would pay for the backward pass of all.
    """
    model.enable_input_require_grads = lambda: None


def speed_up(model: Any, spec: TrainSpec, plan: StepPlan, era: Era, *, is_flash: bool) -> None:  # Any: a PeftModel
    """Put our kernels below a gpt-oss that PEFT has wrapped."""
    extended_from = plan.num_offloaded if spec.parallel == "ddp" else None
    factor_experts(
        model,
        num_recomputed=plan.num_recomputed,
        num_shelved=plan.num_shelved,
        extended_from=extended_from,
        era=era,
    )
    fuse_norms(model)
    if torch.cuda.is_available() and rests_embedding(model.config.to_dict(), spec) and (told := rest_embedding(model)):
        say(told)
    if is_flash:
        flash_attention(model)
        if extended_from is not None:
            # What may rest on the host stays apart wherever it lies, where bits count: joined it rounds otherwise.
            join_layers(model, first=lowest_trained(model) if spec.deterministic else extended_from, era=era)


def trainer_arguments(folder: Path, spec: TrainSpec, plan: StepPlan) -> SFTConfig:
    """Return TRL's settings; rows are packed already, so padding_free only keeps documents apart."""
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {  # Any: SFTConfig takes many types
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.lr_scheduler,
        "warmup_steps": spec.warmup_steps,
        "num_train_epochs": spec.num_epochs,
        "max_steps": spec.max_steps,
        "per_device_train_batch_size": plan.rows_per_device,
        "per_device_eval_batch_size": plan.rows_per_device,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "gradient_checkpointing": plan.checkpointing == "full",
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "optim": "adamw_torch_fused",
        "logging_steps": spec.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_steps": spec.save_steps,
        "eval_strategy": "steps" if spec.eval_steps else "no",
        "eval_steps": spec.eval_steps or None,
        "seed": spec.seed,
        "bf16": on_gpu and spec.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "packing": False,
        "padding_free": True,
        "max_length": None,
        "router_aux_loss_coef": 0.0,  # the router is frozen: balancing it would only disturb the adapter
        "dataloader_pin_memory": on_gpu,
        "report_to": spec.report_to,
        "run_name": folder.name,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False if spec.num_processes > 1 else None,
    }
    if plan.checkpointing == "full":
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return (HostConfig if spec.parallel == "fsdp2" or plan.num_offloaded else SFTConfig)(**settings)


def evaluate_once(trainer: TokenMeanTrainer, path: Path) -> float:
    """Return the validation loss of the untouched base (B is still zero), measured once and kept across resumes."""
    if not path.exists():
        loss = trainer.evaluate()["eval_loss"]
        say(f"validation loss before training {loss:.4f}")
        trainer.accelerator.free_memory()
        if not trainer.is_placed:
            # Evaluating marks the model as prepared, and training would not wrap it: ranks without DDP drift apart.
            vars(trainer.model).pop("_is_accelerate_prepared", None)
        if not trainer.is_world_process_zero():
            return loss
        files.write_json(path, {"eval_loss": loss})
    return files.read_json(path)["eval_loss"]


def run_to_end(trainer: SFTTrainer, checkpoint: Path | None, spec: TrainSpec) -> None:
    """Train, or resume, or only load a run that is finished: Trainer would add one more step to it.

    Raises: Stopped when it returned before its end.
    """
    planned = planned_steps(trainer)
    if trainer.is_world_process_zero():
        restore_best(Path(trainer.args.output_dir or "."), checkpoint)
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        say(f"resuming from {checkpoint.name}")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= planned or is_stopped_early(state, spec):
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        keep_last_step(trainer)  # the next try passes fewer rows at once, and goes on from here
        raise
    require_end(trainer.state, planned, is_over=is_stopped_early(trainer.state, spec))


def keep_last_step(trainer: SFTTrainer) -> None:
    """Write a checkpoint of the last whole step of a run that ran out of memory in the next one.

    One process only: the others of a run wait in a collective operation, and end with the launcher.
    """
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir or ".")
    if trainer.args.world_size > 1 or step == 0 or is_complete(folder / f"checkpoint-{step}"):
        return
    model: Any = trainer.model  # Any: Trainer types it as optional
    model.zero_grad()
    torch.cuda.empty_cache()
    trainer._save_checkpoint(model, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def is_stopped_early(state: TrainerState, spec: TrainSpec) -> bool:
    """Say whether the evaluations so far end the run."""
    return is_over(evaluations(state.log_history), spec.early_stopping_patience, spec.early_stopping_min_delta)


def planned_steps(trainer: SFTTrainer) -> int:
    """Return the number of optimizer steps of the whole run, counted as Trainer counts them."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * max(1, per_epoch))


if __name__ == "__main__":
    _job = files.read_json(Path(sys.argv[1]))
    run_worker(Path(_job["folder"]), lambda: train(_job), stop_grace_s=_job["spec"].get("stop_grace_s", 25.0))
