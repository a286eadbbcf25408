"""QLoRA on a tiny dense model, on the CPU: it learns, and a resumed run is the one that was never interrupted."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore
from tasks.fetch.run import fetch_base, fetch_dataset
from tasks.pack.run import pack_dataset
from tasks.specs import BaseModelSpec, FetchSpec, LoraSpec, PackSpec, TrainSpec
from tests.tasks.train import runs
from tests.tiny import save_dense_model, write_chats

SPEC = TrainSpec(
    lora=LoraSpec(rank=4, alpha=8, dropout=0.05, target_modules=("q_proj", "v_proj")),
    learning_rate=1e-2,
    max_steps=6,
    save_steps=3,
    quantization="nf4",
)


def make_job(folder: Path) -> dict[str, object]:
    save_dense_model(folder / "base")
    store, hub = ArtifactStore(folder / "home"), HfApi(token=False)
    base = fetch_base(BaseModelSpec(model=str(folder / "base")), store, hub)
    source = FetchSpec(source=str(write_chats(folder / "chats.jsonl", 60)), validation_pct=20)
    packed = pack_dataset(fetch_dataset(source, store, hub), base, PackSpec(row_tokens=128), store)
    return {"base_folder": base.model_folder, "packed_folder": packed.folder, "row_tokens": 128}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path):
    from tasks.train.worker import load_base, make_trainer
    from tasks.training import fix_seeds

    job = make_job(tmp_path)

    def train(folder: Path, checkpoint: Path | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        folder.mkdir()
        fix_seeds(SPEC.seed)
        trainer = make_trainer(load_base(tmp_path / "base", SPEC), runs.make_job(job, folder, SPEC), SPEC)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.model is not None
        return losses, {name: w.detach() for name, w in trainer.model.named_parameters() if w.requires_grad}

    try:
        whole, weights = train(tmp_path / "whole", None)
        resumed, again = train(tmp_path / "resumed", tmp_path / "whole" / "checkpoints" / "checkpoint-3")
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole[-1] < whole[0]
    assert resumed == whole
    assert all(weight.dtype == torch.float32 and torch.equal(weight, again[name]) for name, weight in weights.items())


def test_an_evaluation_leaves_weights_that_train(tmp_path: Path):
    """On CPUs with AVX512-BF16 bitsandbytes packs them in eval mode, and there is no gradient through that layout."""
    from tasks.adapters import load_base

    save_dense_model(tmp_path / "base")
    model = load_base(tmp_path / "base", attention="eager", dtype="bfloat16", quantization="nf4")
    embeds = model.get_input_embeddings()(torch.arange(8)[None]).detach()
    with torch.no_grad():
        model.eval()(inputs_embeds=embeds)
    embeds.requires_grad_()
    model.train()(inputs_embeds=embeds).logits.float().square().sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    packed = [
        name for name, w in model.named_parameters() if getattr(w, "quant_state", None) and w.dtype != torch.uint8
    ]
    assert not packed
