"""The part of a PretrainSpec that decides a corpus: a new learning rate tokenises nothing again.

Ring: pure.
"""

from typing import Literal

from tasks.specs import PretrainSpec, Spec


class CorpusQuestion(Spec):
    """What stands in a corpus' key. `max_tokens`: where reading a stream ends, 0: at its own end."""

    source: str
    config: str
    split: str
    text_column: str
    documents: Literal["files", "lines"]
    tokenizer: str
    vocab_size: int
    max_tokens: int
    document_tokens: int


def ask(spec: PretrainSpec, *, is_stream: bool) -> CorpusQuestion:
    """Return what the corpus of `spec` depends on.

    A stream ends where the run has all tokens that it can use: with rows="documents" a document longer than
    row_tokens counts as one row.
    """
    whole = spec.num_steps * spec.rows_per_step * spec.row_tokens
    return CorpusQuestion(
        source=spec.corpus,
        config=spec.corpus_config,
        split=spec.corpus_split,
        text_column=spec.text_column,
        documents=spec.documents,
        tokenizer=spec.tokenizer,
        vocab_size=spec.shape.vocab_size if spec.tokenizer == "train" else 0,
        max_tokens=whole if is_stream else 0,
        document_tokens=spec.row_tokens if is_stream and spec.rows == "documents" else 0,
    )
