"""Tokenise a fetched data set with its base's tokenizer and pack it into rows.

    train.parquet -> render.py -> Documents -> trl.pack_dataset (best fit) -> rows of input_ids, labels, seq_lengths

Ring: edge.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, PackedDataset, make_key
from tasks.errors import DataError, SpecError
from tasks.pack import render
from tasks.pack.report import length_stats
from tasks.specs import PackSpec

VERSION = 2  # 2: a control token in the text of a message is text
_BATCH_ROWS = 256  # of conversations, rendered at once
_CHUNK_DOCUMENTS = 1000  # packed at once, as many as TRL takes: 99.6 % full on the lengths of chats, in bounded memory
_IDS = pa.list_(pa.int32())
_ROWS = pa.schema([("input_ids", _IDS), ("labels", _IDS), ("seq_lengths", _IDS)])
_PROBES = pa.schema([("row_id", pa.string()), ("prompt_ids", _IDS), ("answer_ids", _IDS)])
logger = logging.getLogger(__name__)


def pack_dataset(dataset: FetchedDataset, base: BaseCheckpoint, spec: PackSpec, store: ArtifactStore) -> PackedDataset:
    """Tokenise and pack; a second call returns the finished one.

    Raises: SpecError (row longer than the model's context, no chat template), DataError (document too long).
    """
    key = make_key("pack", VERSION, spec, {}, (dataset, base))
    with store.claim(PackedDataset, key) as claim:
        if claim.found:
            return claim.found
        _check_context(Path(base.model_folder), spec)
        tokenizer = load_tokenizer(Path(base.model_folder), base.origin, is_chat=dataset.is_chat)
        train = _write_split(dataset, "train", tokenizer, spec, claim.folder)
        validation = _write_split(dataset, "validation", tokenizer, spec, claim.folder)
        artifact = PackedDataset(
            key=key,
            folder=str(claim.folder),
            parents=(dataset.ref, base.ref),
            row_tokens=spec.row_tokens,
            num_train_rows=train.num_rows,
            num_validation_rows=validation.num_rows,
            num_train_documents=len(train.lengths),
            num_validation_documents=len(validation.lengths),
            num_train_tokens=sum(train.lengths),
            num_learnt_tokens=train.num_learnt,
            fill_pct=round(100 * sum(train.lengths) / (train.num_rows * spec.row_tokens), 2),
        )
        logger.info("packed %d documents into %d rows", len(train.lengths), artifact.num_train_rows)
        about = {
            "lengths": {"train": length_stats(train.lengths), "validation": length_stats(validation.lengths)},
            "num_dropped": train.num_dropped,
            "dropped_rows": sorted(train.dropped_rows),
            "sample": train.sample,
        }
        return claim.commit(artifact, spec=spec, about=about)


@dataclass
class _Written:
    """What is known of a split once it is on disk. `lengths`: tokens of each document."""

    num_rows: int = 0
    num_learnt: int = 0
    num_dropped: int = 0
    dropped_rows: set[str] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    sample: dict[str, str] = field(default_factory=dict)


def _write_split(
    dataset: FetchedDataset,
    split: str,
    tokenizer: Any,  # Any: see load_tokenizer
    spec: PackSpec,
    folder: Path,
) -> _Written:
    """Render, pack and write one split; of its documents a few thousand are in memory at a time."""
    written = _Written()
    with ExitStack() as stack:
        rows = _open(stack, folder / f"{split}.parquet", _ROWS)
        probes = _open(stack, folder / "validation_documents.parquet", _PROBES) if split == "validation" else None
        for documents in _chunks(_documents(dataset, split, tokenizer, spec, written)):
            columns = _pack(documents, dataset.is_chat, spec)
            rows.write_table(pa.table(columns, schema=_ROWS))
            if probes:
                probes.write_table(pa.table(_probe_columns(documents, spec), schema=_PROBES))
            written.num_rows += len(columns["input_ids"])
            written.num_learnt += sum(len(row) - row.count(render.IGNORE) for row in columns["labels"])
            written.lengths += [document.num_tokens for document in documents]
            written.sample = written.sample or _sample(documents[0], tokenizer)
        if not written.num_rows:
            raise DataError(
                f"no {split} document is left: all are longer than a row of {spec.row_tokens} tokens and were dropped; "
                "raise PackSpec.row_tokens"
            )
    return written


def _open(stack: ExitStack, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer whose file takes its name when the stack is left without an error."""
    return stack.enter_context(pq.ParquetWriter(stack.enter_context(files.aside(path)), schema))


def _check_context(model_folder: Path, spec: PackSpec) -> None:
    config = files.read_json(model_folder / "config.json")
    context = config.get("max_position_embeddings")
    if context and spec.row_tokens > context:
        raise SpecError(
            f"PackSpec.row_tokens = {spec.row_tokens} but the base's context is {context} tokens: lower row_tokens"
        )


def load_tokenizer(folder: Path, origin: str, *, is_chat: bool) -> Any:  # Any: transformers has one class per family
    """Load a base's tokenizer. Raises SpecError when chats are to be rendered and it has no template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if is_chat and not tokenizer.chat_template:
        raise SpecError(
            f"the tokenizer of {origin} has no chat template, so chats can't be rendered: name an instruct model "
            "as base, or train on plain text with FetchSpec.text_column"
        )
    return tokenizer


def _documents(
    dataset: FetchedDataset,
    split: str,
    tokenizer: Any,  # Any: see load_tokenizer
    spec: PackSpec,
    written: _Written,
) -> Iterator[render.Document]:
    """Yield what fits a row, in the data set's order; count in `written` what is dropped."""
    with pq.ParquetFile(dataset.path / f"{split}.parquet") as source:
        for batch in source.iter_batches(_BATCH_ROWS):
            if dataset.is_chat:
                rendered = render.render_chats(batch.to_pylist(), tokenizer, spec)
            else:
                rendered = render.render_texts(batch.to_pylist(), tokenizer)
            if dataset.is_chat or not spec.packing:  # packing splits long texts, drops nothing
                rendered, dropped = render.fit_context(rendered, spec)
                written.num_dropped += len(dropped)
                written.dropped_rows.update(document.row_id for document in dropped)
            yield from rendered


def _chunks(documents: Iterator[render.Document]) -> Iterator[list[render.Document]]:
    while chunk := list(islice(documents, _CHUNK_DOCUMENTS)):
        yield chunk


def _pack(documents: list[render.Document], is_chat: bool, spec: PackSpec) -> dict[str, list[list[int]]]:
    """Return columns of packed rows. TRL's bfd never splits a document; bfd_split fills rows with long texts."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset as trl_pack

    columns = {
        "input_ids": [document.input_ids for document in documents],
        "labels": [render.labels_of(document, spec.loss_on) for document in documents],
    }
    if not spec.packing:
        return {**columns, "seq_lengths": [[document.num_tokens] for document in documents]}
    packed = trl_pack(Dataset.from_dict(columns), spec.row_tokens, "bfd" if is_chat else "bfd_split")
    return {name: packed[:][name] for name in _ROWS.names}


def _probe_columns(documents: list[render.Document], spec: PackSpec) -> dict[str, list[Any]]:  # Any: str, list[int]
    """Return what is scored after serving: a text's first token has nothing before it, so it becomes the prompt."""
    ids = [document.input_ids[: spec.row_tokens] for document in documents]
    num_asked = [max(1, len(document.prompt_ids)) for document in documents]
    return {
        "row_id": [document.row_id for document in documents],
        "prompt_ids": [row[:count] for row, count in zip(ids, num_asked, strict=True)],
        "answer_ids": [row[count:] for row, count in zip(ids, num_asked, strict=True)],
    }


def _sample(document: render.Document, tokenizer: Any) -> dict[str, str]:  # Any: see load_tokenizer
    return {
        "prompt": tokenizer.decode(document.prompt_ids),
        "answer": tokenizer.decode(document.answer_ids[:400]),
    }
