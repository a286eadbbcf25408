"""Find rows that are longer than a packed row before the base is downloaded or made.

    FetchedDataset + the base's tokenizer -> DataError that names the worst row, or a line that says all fit

A token is at least one byte of text, so most rows are known to fit without a tokenizer.

Ring: edge (disk, Hub).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, FetchedDataset, PackedDataset
from tasks.check.base import find_made, find_origin, find_tokenizer
from tasks.pack import render
from tasks.pack.run import load_tokenizer
from tasks.specs import PackSpec, PretrainSpec, Recipe

_TEMPLATE_TOKENS = 512  # of a chat template, beyond what the messages say; gpt-oss's is about 80
_TURN_TOKENS = 16
_BATCH_ROWS = 256
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
    num_rows, doubtful = _count_doubtful(dataset, spec)
    if not doubtful:
        return f"lengths: none of {num_rows} rows can exceed {spec.row_tokens} tokens"
    folder = find_tokenizer(recipe.base, pretraining, store, hub)
    tokenizer = load_tokenizer(folder, recipe.base.model, is_chat=dataset.is_chat)
    written = (
        render.render_chats if dataset.is_chat else lambda rows, tokenizer, spec: render.render_texts(rows, tokenizer)
    )
    longest, num_documents, num_too_long = ("", 0), 0, 0
    for rows in _batches(dataset):
        doubted = [row for row in rows if most_tokens(row, spec.system_prompt) > spec.row_tokens]
        for document in written(doubted, tokenizer, spec):
            num_documents += 1
            num_too_long += document.num_tokens > spec.row_tokens
            longest = max(longest, (document.row_id, document.num_tokens), key=lambda known: known[1])
    if num_too_long:
        raise render.too_long_error(*longest, num_too_long, num_documents, spec)
    return f"lengths: the longest of {num_rows} rows has {longest[1]} tokens, a row holds {spec.row_tokens}"


def _count_doubtful(dataset: FetchedDataset, spec: PackSpec) -> tuple[int, int]:
    """Return (rows, rows that may be too long): without a tokenizer, which may have to be downloaded."""
    counts = [
        (len(rows), sum(most_tokens(row, spec.system_prompt) > spec.row_tokens for row in rows))
        for rows in _batches(dataset)
    ]
    return sum(rows for rows, _ in counts), sum(doubtful for _, doubtful in counts)


def _batches(dataset: FetchedDataset) -> Iterator[list[Row]]:
    for split in ("train", "validation"):
        with pq.ParquetFile(Path(dataset.folder) / f"{split}.parquet") as source:
            for batch in source.iter_batches(_BATCH_ROWS):
                yield batch.to_pylist()


def most_tokens(row: Row, system_prompt: str) -> int:
    """Return a number of tokens that the rendered row can't exceed.

    >>> most_tokens({"text": "ab"}, "")
    514
    """
    if "text" in row:
        return len(row["text"].encode()) + _TEMPLATE_TOKENS
    said = sum(len(message["content"].encode()) + _TURN_TOKENS for message in row["messages"])
    return said + len(system_prompt.encode()) + _TEMPLATE_TOKENS
