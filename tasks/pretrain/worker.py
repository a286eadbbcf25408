"""Train a GptOssForCausalLM from scratch with transformers' Trainer; knows no Prefect.

    python -m tasks.pretrain.worker job.json

A corpus of a few thousand distinct tokens under a vocabulary of 201,088 would spend nearly all of
its time in two huge matrices of which it touches 2 %. With `compact_vocabulary` the model is
trained on the corpus' own ids and one class for all the rest, whose rows of the output matrix are
tied to one vector: its logit is raised by log(number of the rest), so the loss is exactly the full
softmax of the model that is saved, where each row of the rest is that vector.

Ring: edge.  Shapes: B rows, T tokens, H hidden, V vocabulary, S seen ids.
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from tasks import files
from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.gptoss.layout import config_values
from tasks.metrics import read_metrics
from tasks.recorder import Measures, Recorder, say
from tasks.specs import PretrainSpec
from tasks.training import RESULT, Keeper, fix_seeds, require_end, run_worker


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


class Vocabulary:
    """Which ids are trained under which class: the corpus' own, then one class for all the rest."""

    def __init__(self, ids_N: torch.Tensor, vocab_size: int, *, is_compact: bool) -> None:
        self.seen_S = ids_N.unique() if is_compact else torch.arange(vocab_size)
        self.num_rest = vocab_size - len(self.seen_S)
        self._class_V = torch.full((vocab_size,), len(self.seen_S))
        self._class_V[self.seen_S] = torch.arange(len(self.seen_S))

    @property
    def num_classes(self) -> int:
        """S, and one more when there is a rest."""
        return len(self.seen_S) + (self.num_rest > 0)

    def classes(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Return the class of each id."""
        return self._class_V[ids_N]


class TiedRestTrainer(Trainer):
    """Trainer whose last class stands for `num_rest` ids of equal logit."""

    def __init__(self, *args: Any, num_rest: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rest_bias = math.log(num_rest) if num_rest else 0.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean next-token loss of the batch under the full softmax."""
        logits_BTS = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        if self.rest_bias:
            logits_BTS = torch.cat([logits_BTS[..., :-1], logits_BTS[..., -1:] + self.rest_bias], -1)
        return functional.cross_entropy(logits_BTS.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def pretrain(job: dict[str, Any]) -> None:  # Any: JSON values
    """Train, or go on from the newest whole checkpoint, and leave `model/` and result.json."""
    folder, spec = Path(job["folder"]), PretrainSpec.model_validate(job["spec"])
    transformers_logging.disable_progress_bar()
    fix_seeds(spec.seed)
    corpus = Path(job["corpus_folder"])
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    ids_N = torch.from_numpy(np.fromfile(corpus / "tokens.bin", job["corpus"]["dtype"]).astype(np.int64))
    vocabulary = Vocabulary(ids_N, spec.shape.vocab_size, is_compact=spec.compact_vocabulary)
    say(f"corpus: {len(ids_N):,} tokens, {len(ids_N.unique()):,} distinct")
    trained = build_model(spec, tokenizer, vocabulary.num_classes)
    trainer = make_trainer(trained, vocabulary, ids_N, spec, folder)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint_step(checkpoint) < spec.num_steps:  # Trainer would train one more step of a finished run
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        require_end(trainer.state, spec.num_steps)
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    model = expand(trained, vocabulary, spec, tokenizer)
    say(f"model: {model.num_parameters():,} parameters")
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


def build_model(spec: PretrainSpec, tokenizer: Any, vocab_size: int) -> GptOssForCausalLM:
    """Build the model with random weights drawn from the seed (tokenizer is Any: one class per family)."""
    is_full = vocab_size == spec.shape.vocab_size
    config = GptOssConfig(
        **{**config_values(spec.shape), "vocab_size": vocab_size},
        bos_token_id=tokenizer.bos_token_id if is_full else None,
        eos_token_id=tokenizer.eos_token_id if is_full else None,
        pad_token_id=tokenizer.pad_token_id if is_full else None,
    )
    config._attn_implementation = "flex_attention" if torch.cuda.is_available() else "eager"
    return GptOssForCausalLM(config).to(getattr(torch, spec.dtype))


def make_trainer(
    model: GptOssForCausalLM, vocabulary: Vocabulary, ids_N: torch.Tensor, spec: PretrainSpec, folder: Path
) -> Trainer:
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
        logging_steps=max(1, spec.num_steps // 40),
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=spec.seed,
        remove_unused_columns=False,
    )
    trainer = TiedRestTrainer(
        model=model,
        args=args,
        train_dataset=Windows(vocabulary.classes(ids_N), spec),
        callbacks=[
            Recorder(folder, Measures(row_tokens=spec.row_tokens, rows_per_step=spec.rows_per_step)),
            Keeper(),
        ],
        num_rest=vocabulary.num_rest,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def expand(trained: GptOssForCausalLM, vocabulary: Vocabulary, spec: PretrainSpec, tokenizer: Any) -> GptOssForCausalLM:
    """Return the full-vocabulary model that computes the same: each id gets the rows of its class.

    Input rows of ids that the corpus never held keep their random start: nothing is known of them.
    """
    if not vocabulary.num_rest:
        return trained
    model: Any = build_model(spec, tokenizer, spec.shape.vocab_size)  # Any: nn.Module.to is typed oddly
    model.to(trained.device)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    state = {name: tensor for name, tensor in trained.state_dict().items() if name not in tables}
    model.load_state_dict(state, strict=False)
    seen_S = vocabulary.seen_S.to(trained.device)
    model.lm_head.weight[:] = trained.lm_head.weight[-1]
    model.lm_head.weight[seen_S] = trained.lm_head.weight[:-1]
    model.model.embed_tokens.weight[seen_S] = trained.model.embed_tokens.weight[:-1]
    return model


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
