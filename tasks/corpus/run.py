"""Tokenise a corpus once, into files that a trainer maps into memory.

    PretrainSpec -> sources.py -> pieces -> encode.py -> tokens.py -> tokens.bin, document_ends.bin;  tokenizer/

Ring: edge.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, Claim, TokenizedCorpus, make_key
from tasks.corpus.encode import encode
from tasks.corpus.pieces import Piece, cut_blocks
from tasks.corpus.question import CorpusQuestion, ask
from tasks.corpus.report import Statistics
from tasks.corpus.sources import is_hub, pin_corpus, read_pieces, require_unchanged, text_bytes
from tasks.corpus.tokenizer import MAX_TRAIN_BYTES, count_ids, first_bytes, open_tokenizer, pin_tokenizer
from tasks.corpus.tokens import writing
from tasks.errors import DataError
from tasks.specs import PretrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1  # raise pretrain's as well: its key holds the pins, not the tokens
_TYPICAL_TOKEN_BYTES = 4
_SHORT_TOKEN_BYTES = 2  # fewer than the tokens of any text have on average: for the room that is asked for
_LEARNT_CHARS = 1 << 14  # the library that trains gathers 256 texts
_CHECKED_TOKENS = 1 << 24
_SPARE_BYTES = 1 << 28
logger = logging.getLogger(__name__)


def prepare_corpus(spec: PretrainSpec, store: ArtifactStore, hub: HfApi) -> TokenizedCorpus:
    """Tokenise the corpus that `spec` names; a second call returns the finished one.

    Raises: MissingError (no such file, data set, tokenizer), SpecError (the tokenizer does not fit the vocabulary),
        DataError (empty, too small, no such column), CorruptError (not UTF-8, torn file), AccessError, CapacityError,
        TransientError (Hub away, file edited meanwhile).
    """
    pins = pin_inputs(spec, hub)
    question = ask(spec, is_stream=spec.streaming)
    with store.claim(TokenizedCorpus, make_key("corpus", VERSION, question, pins)) as claim:
        corpus = claim.found or _make(spec, question, pins, claim, hub)
    if corpus.num_tokens < spec.row_tokens:
        raise DataError(
            f"corpus {spec.corpus} has {corpus.num_tokens} tokens, less than a row of {spec.row_tokens}: add text, or "
            "lower PretrainSpec.row_tokens"
        )
    return corpus


def pin_inputs(spec: PretrainSpec, hub: HfApi) -> dict[str, str]:
    """Return what the names of corpus and tokenizer mean now; nothing is tokenised.

    Raises: what can be known to be wrong without reading the corpus; see prepare_corpus.
    """
    tokenizer = pin_tokenizer(spec, hub)
    return {"corpus": pin_corpus(spec, hub), **({"tokenizer": tokenizer} if tokenizer else {})}


def survey_corpus(spec: PretrainSpec, hub: HfApi) -> str:
    """Say what preparing will read: of a Hub data set its commit; of files their size, and the first document is read.

    Raises: as pin_inputs; CorruptError or DataError of the first document.
    """
    pin = pin_inputs(spec, hub)["corpus"]
    if is_hub(spec):
        return f"corpus {spec.corpus} at {pin[:12]}"
    with closing(read_pieces(spec, hub, pin)) as pieces:
        if next(pieces, None) is None:
            raise _empty(spec.corpus)
    return f"corpus {spec.corpus}, {text_bytes(spec) / 1e6:.1f} MB"


def _make(
    spec: PretrainSpec, question: CorpusQuestion, pins: dict[str, str], claim: Claim[TokenizedCorpus], hub: HfApi
) -> TokenizedCorpus:
    files.remove_strays(claim.folder)  # what a kill left: tokens may be many GB

    def learnt() -> Iterator[str]:
        pieces = read_pieces(spec, hub, pins["corpus"])
        texts = (part.text for piece in pieces for part in cut_blocks([piece.text], piece.where, _LEARNT_CHARS))
        return first_bytes(texts, min(MAX_TRAIN_BYTES, _TYPICAL_TOKEN_BYTES * question.max_tokens or MAX_TRAIN_BYTES))

    tokenizer = open_tokenizer(spec, pins.get("tokenizer", ""), claim.store.root, hub, learnt)
    tokenizer.save_pretrained(claim.folder / "tokenizer")
    num_ids = count_ids(tokenizer)
    dtype = "uint16" if num_ids <= 1 << 16 else "uint32"
    _require_room(spec, question, dtype, claim.folder)
    found = Statistics(num_ids)
    with closing(read_pieces(spec, hub, pins["corpus"])) as pieces:
        num_tokens = _write(pieces, tokenizer, question, dtype, claim.folder, found)
    require_unchanged(spec, hub, pins["corpus"])
    corpus = TokenizedCorpus(
        key=claim.key,
        folder=str(claim.folder),
        source=spec.corpus,
        pins=pins,
        dtype=dtype,
        vocab_size=num_ids,
        num_documents=found.num_documents,
        num_tokens=num_tokens,
    )
    logger.info("tokenised %d documents of %s into %d tokens", found.num_documents, spec.corpus, num_tokens)
    about = {
        "tokenizer": spec.tokenizer,
        "eos_token": tokenizer.eos_token,
        "statistics": found.values(),
        "samples": ["|".join(tokenizer.backend_tokenizer.decode([i]) for i in ids) for ids in found.samples],
    }
    return claim.commit(corpus, spec=question, about=about)


def _write(
    pieces: Iterable[Piece],
    tokenizer: "PreTrainedTokenizerFast",
    question: CorpusQuestion,
    dtype: str,
    folder: Path,
    found: Statistics,
) -> int:
    """Write the token files; return how many tokens they hold. A stream ends where the run has enough."""
    num_usable = next_check = 0
    eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
    with writing(folder, dtype=dtype, eos_id=eos_id) as writer:
        for piece, ids in encode(pieces, tokenizer.backend_tokenizer):
            writer.add(ids, is_last=piece.is_last)
            length = found.add(piece, ids)
            num_usable += min(length, question.document_tokens or length)
            if question.max_tokens and num_usable >= question.max_tokens:
                break
            if writer.num_tokens > next_check:
                files.require_disk(folder, _SPARE_BYTES, "tokenising the rest")
                next_check += _CHECKED_TOKENS
        if not found.num_documents:
            raise _empty(question.source)
        return writer.finish()


def _require_room(spec: PretrainSpec, question: CorpusQuestion, dtype: str, folder: Path) -> None:
    """Of a Hub data set that is read whole nobody knows the size: then room is only looked at on the way."""
    num_tokens = question.max_tokens or text_bytes(spec) // _SHORT_TOKEN_BYTES
    files.require_disk(folder, num_tokens * (2 if dtype == "uint16" else 4) + _SPARE_BYTES, "tokenising the corpus")


def _empty(source: str) -> DataError:
    return DataError(f"corpus {source} is empty: expected at least one document with text")
