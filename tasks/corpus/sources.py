"""What a corpus' name means, and its text document by document: shipped, files, folders, a Hub data set.

    PretrainSpec -> pin_corpus() -> digest or commit;  -> read_pieces() -> one Piece in memory at a time

Ring: edge (disk, Hub).
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import folder_digest
from tasks.corpus.pieces import PIECE_CHARS, Piece, cut_blocks
from tasks.errors import CorruptError, DataError, MissingError, SpecError, TransientError
from tasks.hub import pin_commit
from tasks.specs import PretrainSpec
from tasks.tables import HubRows, Row, read_file, read_hub

_DATA = Path(__file__).resolve().parents[2] / "data"
SHIPPED = {"shipped": _DATA / "ja_culture" / "corpus.txt", "short_english": _DATA / "short_english" / "sentences.txt"}
SUFFIXES = (".txt", ".jsonl", ".parquet")
_OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".ndjson", ".md", ".html", ".arrow", ".gz", ".zst", ".zip", ".xz", ".tar")


def is_hub(spec: PretrainSpec) -> bool:
    """Say whether the corpus is a Hub data set: what is no name of ours, no path and no file's name.

    A Hub id is `name` or `owner/name`.
    """
    name = spec.corpus
    is_file = name.startswith((".", "/", "~")) or name.endswith((*SUFFIXES, *_OTHER_SUFFIXES))
    return not (name in SHIPPED or is_file or Path(name).expanduser().exists())


def pin_corpus(spec: PretrainSpec, hub: HfApi) -> str:
    """Return what the corpus' name means right now: the digest of its files, or the commit of a Hub data set.

    Raises: MissingError, SpecError (no such kind of file), DataError (too small for a row), AccessError.
    """
    if is_hub(spec):
        return pin_commit(hub, spec.corpus, spec.corpus_revision, "dataset")
    if spec.streaming:
        raise SpecError(f"PretrainSpec.streaming is for Hub data sets, but corpus = {spec.corpus}: set it to false")
    paths = list_paths(spec)
    _refuse_small(spec, paths)
    root = _path(spec)
    if root.is_file():
        return files.digest(root)
    return folder_digest({path.relative_to(root).as_posix(): files.digest(path) for path in paths})


def require_unchanged(spec: PretrainSpec, hub: HfApi, pin: str) -> None:
    """Raise TransientError when a file was edited while it was read: its tokens would lie under the old digest."""
    if not is_hub(spec) and pin_corpus(spec, hub) != pin:
        raise TransientError(f"corpus {spec.corpus} changed while it was read: it is read again")


def list_paths(spec: PretrainSpec) -> list[Path]:
    """Return the files of a corpus on this machine, sorted by their path; hidden ones don't count."""
    root = _path(spec)
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise SpecError(
                f"PretrainSpec.corpus = {root}: {root.suffix or 'such'} files are not read, expected one of "
                f"{', '.join(SUFFIXES)}: save it as one of them"
            )
        return [root]
    if not root.is_dir():
        raise MissingError(f"corpus {root} is not there (working directory {Path.cwd()}): check PretrainSpec.corpus")
    below = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
    shown = {name: path for name, path in below.items() if not any(part.startswith(".") for part in name.parts)}
    found = [path for _, path in sorted((name.as_posix(), path) for name, path in shown.items())]
    readable = [path for path in found if path.suffix in SUFFIXES]
    if not readable:
        held = ", ".join(path.name for path in found[:5]) or "nothing"
        raise MissingError(f"corpus {root} has no file that ends in {', '.join(SUFFIXES)} (it holds: {held})")
    return readable


def text_bytes(spec: PretrainSpec) -> int:
    """Return the size of a corpus on this machine; 0 of a Hub data set, which nobody has counted."""
    return 0 if is_hub(spec) else sum(path.stat().st_size for path in list_paths(spec))


def read_pieces(spec: PretrainSpec, hub: HfApi, pin: str) -> Generator[Piece]:
    """Yield the documents' pieces in their fixed order. Raises CorruptError, DataError, what the Hub raises."""
    if is_hub(spec):
        yield from _read_rows(_hub_rows(spec, pin), spec, hub)
        return
    for path in list_paths(spec):
        yield from _read_text(path, spec) if path.suffix == ".txt" else _read_rows(path, spec, hub)


def _path(spec: PretrainSpec) -> Path:
    return SHIPPED.get(spec.corpus) or Path(spec.corpus).expanduser()


def _refuse_small(spec: PretrainSpec, paths: list[Path]) -> None:
    """A token is at least one byte; only what is compressed may hold more of them."""
    size = sum(path.stat().st_size for path in paths)
    if size < spec.row_tokens and not any(path.suffix == ".parquet" for path in paths):
        raise DataError(
            f"corpus {_path(spec)} has {size} bytes, less than a row of {spec.row_tokens} tokens: add text, or lower "
            "PretrainSpec.row_tokens"
        )


def _hub_rows(spec: PretrainSpec, commit: str) -> HubRows:
    return HubRows(
        repo_id=spec.corpus,
        config=spec.corpus_config,
        split=spec.corpus_split,
        commit=commit,
        is_stream=spec.streaming,
        knob="PretrainSpec.corpus",
        columns=(spec.text_column,),
    )


def _read_text(path: Path, spec: PretrainSpec) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            if spec.documents == "files":
                yield from cut_blocks(iter(lambda: handle.read(PIECE_CHARS), ""), path.name)
                return
            for number, line in enumerate(handle, start=1):
                yield from cut_blocks([line.rstrip("\n")], f"{path.name}:{number}")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 ({error}): convert it, or delete those bytes") from error


def _read_rows(source: Path | HubRows, spec: PretrainSpec, hub: HfApi) -> Iterator[Piece]:
    columns = (spec.text_column,)
    found = read_hub(source, hub) if isinstance(source, HubRows) else read_file(source, columns)
    name = source.name if isinstance(source, HubRows) else str(source)
    with closing(found):  # a stream that is left early ends its downloads
        for where, row in found:
            text = _text(row, spec.text_column, f"{name} ({where})")
            yield from cut_blocks([text], where)


def _text(row: Row | str, column: str, where: str) -> str:
    if isinstance(row, str):
        raise DataError(f"{where}: {row}")
    if column not in row:
        raise DataError(
            f"{where}: there is no column {column!r} (it has: {', '.join(row)}): set PretrainSpec.text_column"
        )
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {column!r} is {type(text).__name__}, expected text: set PretrainSpec.text_column to another of "
            f"{', '.join(row)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column!r} is no Unicode text ({error.reason}): mend that row") from error
    return text
