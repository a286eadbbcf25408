"""Train a GptOssForCausalLM from scratch with transformers' Trainer; knows no Prefect.

    python -m tasks.pretrain.worker job.json

A corpus of a few thousand distinct tokens under a vocabulary of 201,088 would spend nearly all
of its time in the output matrix. `num_negatives` > 0 trains with a sampled softmax instead: the
corpus' own tokens exactly, the rest by a fresh uniform sample whose logits are raised by
log(rest / sample), so that the normaliser is estimated without bias.  The model is a plain full-softmax model
afterwards; the final loss reported here is the full one.
Source: Jean et al., arXiv:1412.2007, section 3; Bengio & Senecal 2008 for the correction.

Ring: edge.  Shapes: B rows, T tokens, H hidden, V vocabulary, S seen ids, N negatives.
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from tasks import files
from tasks.gptoss.layout import config_values
from tasks.metrics import read_metrics
from tasks.specs import PretrainSpec
from tasks.training import (
    RESULT,
    Recorder,
    checkpoint_step,
    fix_seeds,
    latest_checkpoint,
    run_worker,
    say,
)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Fixed windows of T tokens at positions drawn once from the seed; item i is always the same."""

    def __init__(self, ids_N: torch.Tensor, spec: PretrainSpec) -> None:
        self.ids_N, self.row_tokens = ids_N, spec.row_tokens
        draw = torch.Generator().manual_seed(spec.seed)
        num_rows = spec.num_steps * spec.rows_per_step
        self.starts = torch.randint(0, max(1, len(ids_N) - spec.row_tokens), (num_rows,), generator=draw)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        row_T = self.ids_N[start : start + self.row_tokens]
        return {"input_ids": row_T, "labels": row_T}


class SampledSoftmaxTrainer(Trainer):
    """Trainer whose loss normalises over the corpus' ids and a sample of the rest."""

    def __init__(self, *args: Any, seen_S: torch.Tensor, num_negatives: int, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_rest_V = torch.ones(vocab_size, dtype=torch.bool)
        is_rest_V[seen_S] = False
        self.rest_R = is_rest_V.nonzero().flatten()
        self.seen_S, self.num_negatives = seen_S, min(num_negatives, len(self.rest_R))
        self.class_V = torch.full((vocab_size,), -1)
        self.class_V[seen_S] = torch.arange(len(seen_S))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean next-token loss of the batch; full softmax when there are no negatives."""
        inner = self.accelerator.unwrap_model(model)
        hidden_BTH = inner.model(input_ids=inputs["input_ids"]).last_hidden_state
        flat_MH = hidden_BTH[:, :-1].flatten(0, 1)
        wanted_M = inputs["labels"][:, 1:].flatten()
        if not self.num_negatives:
            return functional.cross_entropy(inner.lm_head(flat_MH).float(), wanted_M)
        device = flat_MH.device
        drawn_N = torch.randint(len(self.rest_R), (self.num_negatives,))
        weight_VH = inner.lm_head.weight
        seen_MS = flat_MH @ weight_VH[self.seen_S.to(device)].T
        rest_MN = flat_MH @ weight_VH[self.rest_R[drawn_N].to(device)].T
        rest_MN = rest_MN + math.log(len(self.rest_R) / self.num_negatives)
        return functional.cross_entropy(torch.cat([seen_MS, rest_MN], -1).float(), self.class_V.to(device)[wanted_M])


def pretrain(job: dict[str, Any]) -> None:  # Any: JSON values
    """Train, or go on from the newest whole checkpoint, and leave `model/` and result.json."""
    folder, spec = Path(job["folder"]), PretrainSpec.model_validate(job["spec"])
    transformers_logging.disable_progress_bar()
    fix_seeds(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer_folder"])
    text = Path(job["corpus"]).read_text(encoding="utf-8")
    ids_N = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    say(f"corpus: {len(text):,} characters, {len(ids_N):,} tokens, {len(ids_N.unique()):,} distinct")
    model = build_model(spec, tokenizer)
    say(f"model: {model.num_parameters():,} parameters")
    trainer = make_trainer(model, ids_N, spec, folder)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint_step(checkpoint) < spec.num_steps:  # Trainer would train one more step of a finished run
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    save(model, tokenizer, folder, spec)
    metrics = read_metrics(folder / "metrics.jsonl")
    files.write_json(
        folder / RESULT,
        {
            "num_parameters": model.num_parameters(),
            "num_corpus_tokens": len(ids_N),
            "first_loss": metrics[0]["loss"],
            "last_loss": full_loss(model, ids_N, spec),
        },
    )


def build_model(spec: PretrainSpec, tokenizer: Any) -> GptOssForCausalLM:  # Any: transformers has one class per family
    """Build the model with random weights drawn from the seed."""
    config = GptOssConfig(
        **config_values(spec.shape),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "flex_attention" if torch.cuda.is_available() else "eager"
    return GptOssForCausalLM(config).to(getattr(torch, spec.dtype))


def make_trainer(model: GptOssForCausalLM, ids_N: torch.Tensor, spec: PretrainSpec, folder: Path) -> Trainer:
    """Put model, windows and schedule together; AdamW with cosine decay, as GPT-3 and its heirs."""
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=spec.num_steps,
        per_device_train_batch_size=spec.rows_per_step,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        save_steps=spec.save_steps,
        save_total_limit=1,
        logging_steps=max(1, spec.num_steps // 40),
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=spec.seed,
        remove_unused_columns=False,
    )
    recorder = Recorder(folder, spec.row_tokens * spec.rows_per_step)
    trainer = SampledSoftmaxTrainer(
        model=model,
        args=args,
        train_dataset=Windows(ids_N, spec),
        callbacks=[recorder],
        seen_S=ids_N.unique(),
        num_negatives=spec.num_negatives,
        vocab_size=spec.shape.vocab_size,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def full_loss(model: GptOssForCausalLM, ids_N: torch.Tensor, spec: PretrainSpec) -> float:
    """Return the mean full-softmax loss over eight windows spread over the corpus."""
    model.eval()
    starts = torch.linspace(0, max(0, len(ids_N) - spec.row_tokens - 1), 8).long()
    losses = []
    with torch.no_grad():
        for start in starts.tolist():
            row_1T = ids_N[None, start : start + spec.row_tokens].to(model.device)
            losses.append(model(input_ids=row_1T, labels=row_1T).loss.item())
    return sum(losses) / len(losses)


def save(model: GptOssForCausalLM, tokenizer: Any, folder: Path, spec: PretrainSpec) -> None:  # Any: see build_model
    """Write `model/` aside and rename it: whole or not there."""
    aside, target = folder / "model.tmp", folder / "model"
    shutil.rmtree(aside, ignore_errors=True)
    model.config.dtype = spec.dtype
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    files.fsync_folder(folder)


if __name__ == "__main__":
    _job = files.read_json(Path(sys.argv[1]))
    run_worker(Path(_job["folder"]), lambda: pretrain(_job))
