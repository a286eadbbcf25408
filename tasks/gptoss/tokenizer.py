"""Rebuild the true gpt-oss tokenizer (o200k_harmony, 201,088 ids) without a network.

    oss-harmony's embedded vocabulary -> ranks -> merges -> tokenizer.json
    TRL's copy of the gpt-oss template -> chat_template.jinja

vLLM's harmony path is wired to these ids, so a tiny model needs the same vocabulary as
openai/gpt-oss-20b to be served the way production is. The ranks are checked against the digest
that tiktoken pins for o200k_base; the file is never downloaded.

Ring: edge (disk only).  Units: ids and ranks are the same number below 199,998.
Source: tiktoken_ext/openai_public.py (pattern, special ids, digest); transformers'
        TikTokenConverter (ranks -> merges), here without its per-character loops.
Trap: TRL swaps in its training template only when ours equals its gptoss.jinja byte for byte,
      so the template is copied, never edited.
"""

import base64
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import files
from tasks.errors import CorruptError, MissingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BUILD = 1  # raised when build_tokenizer would write other bytes
NUM_IDS = 201_088
NUM_RANKS = 199_998
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

BOS_TOKEN, BOS_ID = "<|startoftext|>", 199_998
PAD_TOKEN, PAD_ID = "<|endoftext|>", 199_999
EOS_TOKEN, EOS_ID = "<|return|>", 200_002
START_ID, END_ID, MESSAGE_ID, CALL_ID = 200_006, 200_007, 200_008, 200_012

_NAMED_SPECIALS = {
    BOS_ID: BOS_TOKEN,
    PAD_ID: PAD_TOKEN,
    EOS_ID: EOS_TOKEN,
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    START_ID: "<|start|>",
    END_ID: "<|end|>",
    MESSAGE_ID: "<|message|>",
    CALL_ID: "<|call|>",
    200_018: "<|endofprompt|>",
}
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_TOKENIZER_CONFIG = {
    "bos_token": BOS_TOKEN,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS_TOKEN,
    "extra_special_tokens": {},
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": int(1e30),  # transformers' mark for "no limit of the tokenizer's own"
    "pad_token": PAD_TOKEN,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def build_tokenizer(folder: Path) -> None:
    """Write the gpt-oss tokenizer into `folder`, for `AutoTokenizer.from_pretrained(folder)`.

    Writes tokenizer.json (28 MB), special_tokens_map.json, chat_template.jinja and, last,
    tokenizer_config.json; each file appears whole or not at all. Other files are left alone.

    Raises: MissingError when oss-harmony or TRL is not installed; CorruptError when the embedded
    vocabulary is not o200k_base.
    Cost: about 5 s on one core, no network.
    """
    template = _read_chat_template()
    ranks = read_ranks()
    tokenizer = _assemble_tokenizer(ranks)
    files.write_text(folder / "tokenizer.json", tokenizer.to_str())
    specials = {
        key: value for key, value in _TOKENIZER_CONFIG.items() if key in {"bos_token", "eos_token", "pad_token"}
    }
    files.write_json(folder / "special_tokens_map.json", specials)
    files.write_bytes(folder / "chat_template.jinja", template)
    files.write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)


def shared_tokenizer(root: Path) -> Path:
    """Return the tokenizer below `root`, built once (5 s); a second process waits for the first."""
    folder = root / "tokenizers" / f"o200k-harmony-{_BUILD}"
    with files.lock_file(folder.parent / f".{folder.name}.lock", "the tokenizer"):
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            build_tokenizer(aside)
            aside.rename(folder)
            files.fsync_folder(folder.parent)
    return folder


def can_chat(model_folder: Path) -> bool:
    """Say whether vLLM can chat with a model: it reads every gpt_oss as harmony, whatever its own tokenizer is.

    A gpt-oss with another vocabulary answers /v1/completions only: vLLM 0.26 to 0.33 refuse its chats with 400.
    """
    if files.read_json(model_folder / "config.json").get("model_type") != "gpt_oss":
        return True
    path = model_folder / "tokenizer.json"
    added = files.read_json(path).get("added_tokens", []) if path.is_file() else []
    return {START_ID: "<|start|>", MESSAGE_ID: "<|message|>"}.items() <= {t["id"]: t["content"] for t in added}.items()


def special_tokens() -> dict[int, str]:
    """Return id -> text of the 1,090 special tokens, ids ascending and without a gap.

    >>> specials = special_tokens()
    >>> len(specials), specials[200002], specials[200013], max(specials)
    (1090, '<|return|>', '<|reserved_200013|>', 201087)
    """
    return {i: _NAMED_SPECIALS.get(i, f"<|reserved_{i}|>") for i in range(NUM_RANKS, NUM_IDS)}


def read_ranks() -> list[bytes]:
    """Return the 199,998 byte strings of o200k_base in rank order.

    Raises: MissingError without oss-harmony; CorruptError when the digest differs.
    """
    try:
        from openai_harmony import load_harmony_encoding  # the import name of the oss-harmony package
    except ImportError as error:
        raise MissingError(
            "the gpt-oss vocabulary comes with the package oss-harmony, which is not installed in "
            f"{sys.prefix}: run `make setup`, or install `oss-harmony==0.0.11`"
        ) from error
    decode: Any = load_harmony_encoding("HarmonyGptOss")._inner.decode_bytes  # Any: Rust, no stubs
    ranks = [bytes(decode([rank])) for rank in range(NUM_RANKS)]
    check_ranks(ranks)
    return ranks


def check_ranks(ranks: list[bytes]) -> None:
    """Raise CorruptError unless `ranks`, written as a tiktoken file, has tiktoken's digest for o200k_base."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))
    found = hashlib.sha256(b"".join(lines)).hexdigest()
    if found != RANKS_SHA256:
        raise CorruptError(
            f"the vocabulary of oss-harmony has sha256 {found} but o200k_base has {RANKS_SHA256}: "
            "install `oss-harmony==0.0.11` again, or take the tokenizer files from openai/gpt-oss-20b"
        )


def list_merges(ranks: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return every pair of tokens whose concatenation is a token, in the order BPE must try them.

    tiktoken joins whichever neighbours make the lowest rank; a merge list says the same when all
    splits of a token are listed at its rank.

    >>> list_merges([b"a", b"b", b"ab", b"aba"])
    [(b'a', b'b'), (b'ab', b'a')]
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in rank_of and pair[1] in rank_of]
        merges.extend(sorted(pairs, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]])))
    return merges


def _printable_bytes() -> str:
    """Return the 256 characters by which byte-level BPE writes the bytes 0..255 (GPT-2's table)."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return "".join(chr(byte) if byte in kept else chr(next(moved)) for byte in range(256))


def _assemble_tokenizer(ranks: list[bytes]) -> "Tokenizer":
    """Build the byte-level BPE with o200k's split pattern and the harmony special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    table = str.maketrans(dict(enumerate(_printable_bytes())))
    text_of = {token: token.decode("latin-1").translate(table) for token in ranks}
    vocabulary = {text: rank for rank, text in enumerate(text_of.values())}
    merges = [(text_of[left], text_of[right]) for left, right in list_merges(ranks)]
    # ignore_merges: a piece that is a token stays whole, as in tiktoken
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in special_tokens().values()]
    )
    assert tokenizer.get_vocab_size(with_added_tokens=True) == NUM_IDS
    return tokenizer


def _read_chat_template() -> bytes:
    """Return TRL's copy of the gpt-oss chat template, without importing TRL (8 s)."""
    spec = importlib.util.find_spec("trl")  # finds a top-level package without running it
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [Path(folder) / "chat_templates" / "gptoss.jinja" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise MissingError(
            f"the gpt-oss chat template comes with TRL as chat_templates/gptoss.jinja, which is not in {sys.prefix} "
            f"(looked in {[str(p) for p in paths]}): run `make setup`, or install `trl==1.16.0`"
        )
    return path.read_bytes()
