"""Find rows that are longer than a packed row before the base is downloaded or made.

    FetchedDataset + the base's tokenizer -> DataError that names the worst row, or a line that says all fit

A token is at least one byte of text, so most rows are known to fit without a tokenizer.

Ring: edge (disk, Hub).
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, FetchedDataset, PackedDataset
from tasks.check.base import find_made, find_origin, find_tokenizer
from tasks.pack import render
from tasks.pack.run import load_tokenizer
from tasks.specs import PretrainSpec, Recipe

_TEMPLATE_TOKENS = 512  # of a chat template, beyond what the messages say; gpt-oss's is about 80
_TURN_TOKENS = 16
Row = dict[str, Any]  # Any: row values


def check_lengths(
    dataset: FetchedDataset, recipe: Recipe, pretraining: PretrainSpec | None, store: ArtifactStore, hub: HfApi
) -> str:
    """Say that every row fits. Raises DataError naming the longest that does not, SpecError without a template."""
    spec = recipe.pack
    if spec.too_long == "drop" or (spec.packing and not dataset.is_chat):
        return "lengths: no row is too long for this PackSpec"
    packed = find_made(store, PackedDataset, spec, find_origin(recipe.base, pretraining, hub))
    if packed and packed.parents[0] == dataset.ref:
        return "lengths: packed before"
    rows = [row for split in ("train", "validation") for row in _rows(dataset, split)]
    doubtful = [row for row in rows if most_tokens(row, spec.system_prompt) > spec.row_tokens]
    if not doubtful:
        return f"lengths: none of {len(rows)} rows can exceed {spec.row_tokens} tokens"
    folder = find_tokenizer(recipe.base, pretraining, store.root, hub)
    tokenizer = load_tokenizer(folder, recipe.base.model, is_chat=dataset.is_chat)
    written = render.render_chats(doubtful, tokenizer, spec) if dataset.is_chat else None
    documents = render.render_texts(doubtful, tokenizer) if written is None else written
    render.fit_context(documents, spec)
    longest = max(document.num_tokens for document in documents)
    return f"lengths: the longest of {len(rows)} rows has {longest} tokens, a row holds {spec.row_tokens}"


def most_tokens(row: Row, system_prompt: str) -> int:
    """Return a number of tokens that the rendered row can't exceed.

    >>> most_tokens({"text": "ab"}, "")
    514
    """
    if "text" in row:
        return len(row["text"].encode()) + _TEMPLATE_TOKENS
    said = sum(len(message["content"].encode()) + _TURN_TOKENS for message in row["messages"])
    return said + len(system_prompt.encode()) + _TEMPLATE_TOKENS


def _rows(dataset: FetchedDataset, split: str) -> list[Row]:
    return pq.read_table(Path(dataset.folder) / f"{split}.parquet").to_pylist()
