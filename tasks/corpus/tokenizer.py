"""The tokenizer of a corpus: gpt-oss's own, one that is trained on it, a folder's or the Hub's.

    PretrainSpec -> pin_tokenizer() -> what a moving name means;  -> open_tokenizer() -> a fast tokenizer

Loads tokenizers and the fast half of transformers, never torch.

Ring: edge (disk, Hub).  Units: bytes of UTF-8.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import folder_digest
from tasks.errors import CorruptError, MissingError, SpecError
from tasks.gptoss.tokenizer import NUM_IDS, PATTERN, shared_tokenizer
from tasks.hub import hub_errors, pin_commit
from tasks.specs import PretrainSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MAX_TRAIN_BYTES = 64_000_000  # at worst, words that are all long and different, 110 bytes of memory for each
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_SPECIALS = [BOS, EOS, PAD, "<|start|>", "<|message|>", "<|end|>"]
_MIN_IDS = 256 + len(_SPECIALS)
_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
]  # fmt: skip
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}"
    "{{ '<|eos|>' if message['role'] == 'assistant' else '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}"
)
logger = logging.getLogger(__name__)


def pin_tokenizer(spec: PretrainSpec, hub: HfApi) -> str:
    """Return the digest or commit of a named tokenizer; "" for one whose bytes follow from spec and corpus.

    Raises: SpecError when it can't fit shape.vocab_size, MissingError, AccessError.
    """
    wanted = spec.shape.vocab_size
    if spec.tokenizer == "gpt-oss":
        if wanted < NUM_IDS:
            raise SpecError(
                f"GptOssShape.vocab_size = {wanted} but the gpt-oss tokenizer has {NUM_IDS} ids, which vLLM's harmony "
                "path is wired to: leave it out, or choose another PretrainSpec.tokenizer ('train')"
            )
        return ""
    if spec.tokenizer == "train":
        if wanted < _MIN_IDS:
            raise SpecError(
                f"GptOssShape.vocab_size = {wanted} but a tokenizer that is trained has at least {_MIN_IDS} ids (256 "
                f"bytes and {len(_SPECIALS)} control tokens): raise it"
            )
        return ""
    folder = _local_folder(spec)
    if folder is None:
        return pin_commit(hub, spec.tokenizer, "main", "model")
    _require_file(folder)
    return folder_digest({name: files.digest(folder / name) for name in _FILES if (folder / name).is_file()})


def open_tokenizer(
    spec: PretrainSpec, pin: str, root: Path, hub: HfApi, texts: Callable[[], Iterator[str]]
) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that `spec` names.

    Args:
        spec: whose `tokenizer` and `shape.vocab_size` are used.
        pin: what pin_tokenizer said.
        root: where the gpt-oss tokenizer is kept.
        hub: client for a Hub id.
        texts: begins to read the corpus; called only to train.
    Raises: SpecError naming both numbers when it has more ids than shape.vocab_size; MissingError, CorruptError.
    """
    if spec.tokenizer == "train":
        tokenizer = _wrap(train_bpe(first_bytes(texts(), MAX_TRAIN_BYTES), spec.shape.vocab_size))
    else:
        tokenizer = _load(_find_folder(spec, pin, root, hub), spec.tokenizer)
    num_ids = count_ids(tokenizer)
    if num_ids > spec.shape.vocab_size:
        raise SpecError(
            f"tokenizer {spec.tokenizer} has {num_ids} ids but GptOssShape.vocab_size = {spec.shape.vocab_size}: raise "
            "vocab_size, or choose another PretrainSpec.tokenizer"
        )
    return tokenizer


def count_ids(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return one more than the highest id."""
    return max(tokenizer.get_vocab().values()) + 1


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield texts until they have `limit` bytes together.

    >>> list(first_bytes(["ab", "cd", "ef"], 3))
    ['ab', 'cd']
    """
    size = 0
    for text in texts:
        if size >= limit:
            logger.info("the tokenizer learns from the first %.1f MB of the corpus", size / 1e6)
            return
        size += len(text.encode())
        yield text


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE with o200k's split pattern; the same texts give the same tokenizer.

    Cost: memory grows with the distinct words: at worst 110 bytes, and 3.5 us, for each byte of text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wrap(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,  # pyright: ignore[reportArgumentType]  (typed as the class itself)
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _load(folder: Path, name: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the Rust library raises plain Exception for a file that it can't parse
        raise CorruptError(f"tokenizer {name} ({folder}) can't be read: {error}; download or make it again") from error


def _find_folder(spec: PretrainSpec, pin: str, root: Path, hub: HfApi) -> Path:
    if spec.tokenizer == "gpt-oss":
        return shared_tokenizer(root)
    folder = _local_folder(spec)
    if folder is None:
        with hub_errors(f"tokenizer {spec.tokenizer}@{pin[:8]}"):
            folder = Path(hub.snapshot_download(spec.tokenizer, revision=pin, allow_patterns=_FILES))
    _require_file(folder)
    return folder


def _local_folder(spec: PretrainSpec) -> Path | None:
    folder = Path(spec.tokenizer).expanduser()
    if folder.is_dir() or spec.tokenizer.startswith((".", "/", "~")):
        return folder.resolve()
    return None


def _require_file(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise MissingError(
            f"tokenizer {folder} has no tokenizer.json: check PretrainSpec.tokenizer; a tokenizer of another form "
            "becomes one by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
