"""Train a GptOssForCausalLM from scratch with transformers' Trainer; knows no Prefect.

    python -m tasks.pretrain.worker job.json           one process
    torchrun ... -m tasks.pretrain.worker job.json     one per GPU

Ring: edge.  Shapes: N tokens of the corpus.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from tasks import files
from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.costs import peak_flops, whole_flops_per_token
from tasks.gptoss.documents import separate_documents
from tasks.gptoss.forward import find_decoder, flash_attention, fuse_norms
from tasks.gptoss.layout import config_values
from tasks.gptoss.trained_experts import train_experts
from tasks.metrics import read_metrics, truncate_metrics
from tasks.pretrain.compact import TiedRestTrainer, Vocabulary, expand
from tasks.pretrain.loss import train_head
from tasks.pretrain.plan import EXPERTS, choose_attention, trainer_settings, uses_fused_kernels
from tasks.pretrain.rows import DocumentRows, TokenFile, Windows, collate, open_held_out, open_rows
from tasks.pretrain.trainer import HostArguments, PretrainTrainer, SharedTrainer, held_bytes, whole_state
from tasks.recorder import Measures, Recorder, say
from tasks.specs import PretrainSpec
from tasks.training import RESULT, Keeper, fix_seeds, is_rank_zero, require_end, run_worker

_NUM_SCORED = 8  # rows that the last loss is the mean of


def pretrain(job: dict[str, Any]) -> None:  # Any: JSON values
    """Train, or go on from the newest whole checkpoint, and leave `model/` and result.json."""
    folder, spec = Path(job["folder"]), PretrainSpec.model_validate(job["spec"])
    corpus_folder = Path(job["corpus_folder"])
    transformers_logging.disable_progress_bar()
    fix_seeds(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")
    corpus = TokenFile.open(corpus_folder, job["corpus"]["dtype"])
    trainer = (make_compact_trainer if spec.compact_vocabulary else make_trainer)(corpus, spec, tokenizer, folder)
    run_to_end(trainer, spec, folder)
    trained: Any = trainer.model  # Any: Trainer types it as optional
    if isinstance(trainer, TiedRestTrainer):
        trained = expand(trained, trainer.vocabulary, lambda: build_model(spec, tokenizer, spec.shape.vocab_size))
    last_loss = full_loss(trained, corpus.cut(spec)[0], spec)
    held_out = trainer.evaluate()["eval_loss"] if spec.validation_pct else None
    num_parameters = sum(weight.numel() for weight in trained.parameters())
    memory = held_bytes(trainer)
    state = whole_state(trained)
    if is_rank_zero():
        told = f", {held_out:.4f} on what was held out" if held_out is not None else ""
        say(f"model: {num_parameters:,} parameters, loss {last_loss:.4f}{told}")
        save(state, trained.config, tokenizer, folder, spec)
        metrics = read_metrics(folder / "metrics.jsonl")
        result = {"num_parameters": num_parameters, "first_loss": metrics[0]["loss"], "last_loss": last_loss}
        files.write_json(folder / RESULT, {**result, "validation_loss": held_out, "memory": memory})


def build_model(spec: PretrainSpec, tokenizer: Any, vocab_size: int) -> GptOssForCausalLM:
    """Build the model with random weights drawn from the seed, on the device that it is trained on.

    The tokenizer is Any, here and below: one class per family, whose ids are typed as any kind of token.
    """
    is_full = vocab_size == spec.shape.vocab_size
    config = GptOssConfig(
        **{**config_values(spec.shape), "vocab_size": vocab_size},
        router_aux_loss_coef=spec.router_aux_loss_coef,
        bos_token_id=tokenizer.bos_token_id if is_full else None,
        eos_token_id=tokenizer.eos_token_id if is_full else None,
        pad_token_id=tokenizer.pad_token_id if is_full else None,
    )
    attention = choose_attention(spec, on_gpu=torch.cuda.is_available())
    config._attn_implementation = "eager" if attention == "flash" else attention  # ours is put in its place
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return GptOssForCausalLM(config).to(getattr(torch, spec.dtype))


def make_compact_trainer(corpus: TokenFile, spec: PretrainSpec, tokenizer: Any, folder: Path) -> TiedRestTrainer:
    """Put a model of the corpus' own ids, its windows and the schedule together."""
    ids_N = corpus.read(0, len(corpus.ids_N))
    vocabulary = Vocabulary(ids_N, spec.shape.vocab_size, is_compact=True)
    say(f"corpus: {len(ids_N):,} tokens, {vocabulary.num_classes:,} classes")
    classes = TokenFile(ids_N=vocabulary.classes(ids_N).numpy(), ends_D=corpus.ends_D)
    trainer = TiedRestTrainer(
        model=build_model(spec, tokenizer, vocabulary.num_classes),
        args=trainer_arguments(spec, folder),
        train_dataset=Windows.drawn(classes, spec),
        data_collator=collate,
        vocabulary=vocabulary,
    )
    finish_trainer(trainer, spec, folder)
    return trainer


def make_trainer(corpus: TokenFile, spec: PretrainSpec, tokenizer: Any, folder: Path) -> PretrainTrainer:
    """Put model, rows, schedule and our kernels together."""
    model = build_model(spec, tokenizer, spec.shape.vocab_size)
    learnt, held_out = corpus.cut(spec)
    rows = open_rows(learnt, spec)
    validation = open_held_out(held_out, spec) if spec.validation_pct else None
    say(f"corpus: {len(learnt.ids_N):,} tokens, {len(learnt.ends_D):,} documents, {len(rows):,} rows")
    if validation is not None:
        say(f"held out: {len(held_out.ids_N):,} tokens, {len(validation):,} rows of them are scored")
    if uses_fused_kernels(spec):
        train_experts(find_decoder(model), recompute=spec.checkpointing == "selective")
        fuse_norms(model)
    if choose_attention(spec, on_gpu=torch.cuda.is_available()) == "flash":
        flash_attention(model)
    elif isinstance(rows, DocumentRows):
        separate_documents(model)
    train_head(model, spec.router_aux_loss_coef)
    is_shared = spec.parallel == "fsdp2" and spec.num_processes > 1  # what several left, one goes on with
    trainer_class = SharedTrainer if is_shared else PretrainTrainer
    trainer = trainer_class(
        model=model,
        args=trainer_arguments(spec, folder),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
    )
    if isinstance(trainer, SharedTrainer):
        trainer.share()
    finish_trainer(trainer, spec, folder)
    return trainer


def trainer_arguments(spec: PretrainSpec, folder: Path) -> HostArguments:
    """Return Trainer's settings; the model is on its device already."""
    return HostArguments(**trainer_settings(spec, folder, on_gpu=torch.cuda.is_available()))


def finish_trainer(trainer: Trainer, spec: PretrainSpec, folder: Path) -> None:
    """Add what records a run, and keeps it."""
    rows: Any = trainer.train_dataset  # Any: one of ours, which know their lengths
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else 0.0
    mean_tokens = float(rows.lengths if isinstance(rows.lengths, int) else rows.lengths.mean())
    measures = Measures(
        row_tokens=rows.lengths,
        rows_per_step=spec.rows_per_step,
        flops_per_token=whole_flops_per_token(config_values(spec.shape), mean_tokens),
        peak_flops=peak * spec.num_processes,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(folder, measures))
    trainer.add_callback(Keeper())


def run_to_end(trainer: Trainer, spec: PretrainSpec, folder: Path) -> None:
    """Train, resume, or only load a run that is finished: Trainer would train one more step of it."""
    is_first = trainer.is_world_process_zero()
    checkpoint = latest_checkpoint(folder / "checkpoints", is_owner=is_first)
    trainer.accelerator.wait_for_everyone()
    if is_first:
        truncate_metrics(folder / EXPERTS, checkpoint_step(checkpoint))
    if checkpoint_step(checkpoint) < spec.num_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        require_end(trainer.state, spec.num_steps)
    else:
        trainer._load_from_checkpoint(str(checkpoint))


def full_loss(model: Any, corpus: TokenFile, spec: PretrainSpec) -> float:  # Any: GptOssForCausalLM
    """Return the mean loss over rows spread over what was learnt, each by itself."""
    model.eval()
    rows = open_rows(corpus, spec)
    if isinstance(rows, Windows):
        last = max(0, len(corpus.ids_N) - spec.row_tokens - 1)
        starts = torch.linspace(0, last, _NUM_SCORED).long().tolist()
        chosen = [corpus.read(start, start + spec.row_tokens) for start in starts]
    else:
        chosen = [rows[number] for number in torch.linspace(0, len(rows) - 1, _NUM_SCORED).long().tolist()]
    losses = []
    with torch.no_grad():
        for row in chosen:
            batch = {name: value.to(model.device) for name, value in collate([row]).items()}
            if spec.compact_vocabulary:
                del batch["position_ids"]
            losses.append(model(**batch).loss.item())
    return sum(losses) / len(losses)


def save(
    state: dict[str, torch.Tensor],
    config: GptOssConfig,
    tokenizer: Any,
    folder: Path,
    spec: PretrainSpec,
) -> None:
    """Write `model/` aside and rename it: whole or not there."""
    aside, target = folder / "model.tmp", folder / "model"
    shutil.rmtree(aside, ignore_errors=True)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)  # not the trained one: it may be shared out, and its class renamed
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.config.dtype = spec.dtype
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    files.fsync_folder(folder)


if __name__ == "__main__":
    _job = files.read_json(Path(sys.argv[1]))
    run_worker(Path(_job["folder"]), lambda: pretrain(_job))
