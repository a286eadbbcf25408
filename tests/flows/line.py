"""The line on a one-layer gpt-oss with the true vocabulary, and what its steps leave when they are killed."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from flows.recipes import resolve, resolve_pretrain
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel, ServedModel, make_key
from tasks.fetch.run import fetch_base, fetch_dataset
from tasks.gptoss.layout import config_values
from tasks.gptoss.tokenizer import BOS_ID, EOS_ID, PAD_ID
from tasks.merge.run import merge_adapter
from tasks.pack.run import pack_dataset
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import Recipe, ServeSpec, change
from tasks.train.run import train_adapter
from tests.needs import lack
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = Path(os.environ.get("TATARA_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")

STEPS = {  # step -> what appears when it begins to work
    "fetch": "dataset/*",
    "pack": "packed/*",
    "train": "adapter/*/metrics.jsonl",
    "merge": "merged/*",
    "publish": "published/*",
    "serve": "services/vllm.log",
    "verify": "served/*/manifest.json",
}


MAKES = {
    "fetch": "dataset",
    "pack": "packed",
    "train": "adapter",
    "merge": "merged",
    "publish": "published",
    "serve": "served",
    "verify": "health",
}


def need_vllm() -> None:
    if not VLLM_PYTHON.exists():
        lack(f"vLLM's environment is missing ({VLLM_PYTHON}): python3 deployments/environments.py vllm")


def changes_of_tiny(base: Path, vllm_port: int, gateway_port: int) -> dict[str, Any]:
    return {
        "base": {"model": str(base)},
        "fetch": {"max_rows": 16},  # each row costs a softmax over 201,088 ids at every token
        "train": {"max_steps": 6, "save_steps": 3, "learning_rate": 3e-2, "rows_per_device": 1},
        "serve": {"vllm_port": vllm_port, "gateway_port": gateway_port},
        "verify": {"num_answers": 3, "min_base_margin": 0.02, "max_answer_tokens": 16},
    }


def make_base_folder(folder: Path, tokenizer: Path) -> Path:
    """An untrained gpt-oss of one layer with the true vocabulary and tokenizer."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_experts": 4}
    shape = resolve_pretrain("tiny").shape.model_copy(update=sizes)
    torch.manual_seed(0)
    config = GptOssConfig(**config_values(shape), bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    GptOssForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def make_inputs(folder: Path, tokenizer: Path) -> tuple[dict[str, Any], Recipe, dict[str, str]]:
    """A base below `folder`; return what the recipe tiny changes for it, the recipe, and the variables of its home."""
    base = make_base_folder(folder / "base", tokenizer)
    changes = changes_of_tiny(base, free_port(), free_port())
    variables = {"TATARA_HOME": str(folder / "home"), "FILE_QUEUE_PATH": str(folder / "traces.jsonl")}
    return changes, change(resolve("tiny"), changes), {**os.environ, **variables}


def run_to_merge(recipe: Recipe, store: ArtifactStore) -> MergedModel:
    hub = HfApi(token=False)
    base = fetch_base(recipe.base, store, hub)
    packed = pack_dataset(fetch_dataset(recipe.fetch, store, hub), base, recipe.pack, store)
    adapter = train_adapter(packed, base, recipe.train, store, lambda record: None)
    return merge_adapter(adapter, recipe.merge, store)


def serve_unchecked(published: PublishedModel, folder: Path, spec: ServeSpec, store: ArtifactStore) -> ServedModel:
    """Serve `folder` as what was published, the way a deploy does that does not look at the files."""
    now = services.start(ServiceSettings(model=str(folder), spec=spec, home=store.root))
    key = make_key("serve", 1, spec, {"time": str(time.time_ns())}, (published,))
    with store.claim(ServedModel, key) as claim:
        served = ServedModel(
            key=key,
            folder=str(claim.folder),
            parents=(published.ref,),
            model_folder=str(folder),
            model_digest=published.model_digest,
            served_model_name=spec.served_model_name,
            dtype="float32",
            vllm_url=now.vllm.url,
            gateway_url=now.gateway.url,
            reused=now.reused,
        )
        return claim.commit(served, spec=spec)


def wait_for_step(store: ArtifactStore, step: str, runs: Callable[[], bool], timeout_s: float = 240.0) -> bool:
    """Return as soon as the step begins to work; False when its run ended before, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(not path.name.startswith(".") for path in store.root.glob(STEPS[step])):
            return True
        if not runs():
            return False
        time.sleep(0.0005)
    return False


def is_made(store: ArtifactStore, step: str) -> bool:
    """Whether the step's artifact is called whole; whatever is called whole in the store must be."""
    manifests = list(store.root.glob("*/*/manifest.json"))
    for manifest in manifests:
        assert store.load(f"{manifest.parts[-3]}/{json.loads(manifest.read_text())['artifact']['key']}")
    return MAKES[step] in {manifest.parts[-3] for manifest in manifests}
