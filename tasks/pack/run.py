"""Tokenise a fetched data set with its base's tokenizer and pack it into rows.

    train.parquet -> render.py -> Documents -> trl.pack_dataset (best fit) -> rows of input_ids, labels, seq_lengths

Ring: edge.
"""

import logging
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
        train, dropped = _documents(dataset, "train", tokenizer, spec)
        validation, _ = _documents(dataset, "validation", tokenizer, spec)
        _refuse_empty(train, validation, spec)
        rows = _pack(train, dataset.is_chat, spec)
        validation_rows = _pack(validation, dataset.is_chat, spec)
        _write(claim.folder / "train.parquet", rows)
        _write(claim.folder / "validation.parquet", validation_rows)
        _write(claim.folder / "validation_documents.parquet", _probe_columns(validation, spec))
        num_tokens = sum(document.num_tokens for document in train)
        artifact = PackedDataset(
            key=key,
            folder=str(claim.folder),
            parents=(dataset.ref, base.ref),
            row_tokens=spec.row_tokens,
            num_train_rows=len(rows["input_ids"]),
            num_validation_rows=len(validation_rows["input_ids"]),
            num_train_documents=len(train),
            num_validation_documents=len(validation),
            num_train_tokens=num_tokens,
            num_learnt_tokens=sum(label != render.IGNORE for row in rows["labels"] for label in row),
            fill_pct=round(100 * num_tokens / (len(rows["input_ids"]) * spec.row_tokens), 2),
        )
        logger.info("packed %d documents into %d rows", len(train), artifact.num_train_rows)
        return claim.commit(artifact, spec=spec, about=_about(train, validation, dropped, tokenizer))


def _refuse_empty(train: list[render.Document], validation: list[render.Document], spec: PackSpec) -> None:
    for split, documents in (("train", train), ("validation", validation)):
        if not documents:
            raise DataError(
                f"no {split} document is left: all are longer than a row of {spec.row_tokens} tokens and were dropped; "
                "raise PackSpec.row_tokens"
            )


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
    tokenizer: Any,
    spec: PackSpec,  # Any: see load_tokenizer
) -> tuple[list[render.Document], list[render.Document]]:
    rows = pq.read_table(dataset.path / f"{split}.parquet").to_pylist()
    if dataset.is_chat:
        return render.fit_context(render.render_chats(rows, tokenizer, spec), spec)
    texts = render.render_texts(rows, tokenizer)
    return (texts, []) if spec.packing else render.fit_context(texts, spec)  # packing splits long texts, drops nothing


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
    return {name: packed[:][name] for name in ("input_ids", "labels", "seq_lengths")}


def _probe_columns(documents: list[render.Document], spec: PackSpec) -> dict[str, list[Any]]:  # Any: str, list[int]
    """Return what is scored after serving: a text's first token has nothing before it, so it becomes the prompt."""
    ids = [document.input_ids[: spec.row_tokens] for document in documents]
    num_asked = [max(1, len(document.prompt_ids)) for document in documents]
    return {
        "row_id": [document.row_id for document in documents],
        "prompt_ids": [row[:count] for row, count in zip(ids, num_asked, strict=True)],
        "answer_ids": [row[count:] for row, count in zip(ids, num_asked, strict=True)],
    }


def _write(path: Path, columns: dict[str, list[Any]]) -> None:  # Any: str and list[int] columns
    arrays = {
        name: pa.array(values, type=pa.string() if name == "row_id" else pa.list_(pa.int32()))
        for name, values in columns.items()
    }
    with files.aside(path) as temporary:
        pq.write_table(pa.table(arrays), temporary)


def _about(
    train: list[render.Document],
    validation: list[render.Document],
    dropped: list[render.Document],
    tokenizer: Any,  # Any: see load_tokenizer
) -> dict[str, Any]:  # Any: JSON values
    return {
        "lengths": {
            "train": length_stats([document.num_tokens for document in train]),
            "validation": length_stats([document.num_tokens for document in validation]),
        },
        "num_dropped": len(dropped),
        "dropped_rows": sorted({document.row_id for document in dropped}),
        "sample": {
            "prompt": tokenizer.decode(train[0].prompt_ids),
            "answer": tokenizer.decode(train[0].answer_ids[:400]),
        },
    }
