"""Which variables and words a child process, a log or a manifest may see: no credentials.

    os.environ -> without_secrets() -> a trainer, vLLM, the gateway, Prefect's server
    argv       -> hide_secrets()    -> a log line

Ring: pure (the environment comes in as an argument).
"""

import re
from collections.abc import Iterable, Mapping

from tasks.errors import SpecError

_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|WEBHOOK_URL|CONNECTION_STRING)S?(_|$)"
    r"|(^|_)(KEY|KEYS|AUTH|PAT|DSN|COOKIE)(_|$)|_PWD$",
    re.IGNORECASE,
)
_FOREIGN = re.compile(
    r"^(WANDB|WEAVE|PREFECT|REDIS|AWS|AZURE|GOOGLE|OPENAI|ANTHROPIC)_|^PYTHON(PATH|HOME)$|^VIRTUAL_ENV$"
)
_LOGIN = re.compile(r"://[^/\s@]+@|(^|[\s;&?])(password|passwd|pwd)\s*=", re.IGNORECASE)
_OPTION = re.compile(r"--(api[-_]k|hf[-_]t)[\w-]*", re.IGNORECASE)  # argparse also takes what an option begins with


def without_secrets(variables: Mapping[str, str], *, keep: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the variables that a child may see: no credentials, no other tool's settings.

    `keep` holds names, or prefixes that end in "_", which pass in any case. Proxies pass with their login: a
    download needs it.

    >>> without_secrets({"PATH": "/bin", "WANDB_API_KEY": "s", "HF_TOKEN": "t", "TOKENIZERS_PARALLELISM": "0"})
    {'PATH': '/bin', 'TOKENIZERS_PARALLELISM': '0'}
    >>> without_secrets({"REDIS_URL": "redis://u:p@h", "DB": "pg://u:p@h"}, keep=("REDIS_",))
    {'REDIS_URL': 'redis://u:p@h'}
    """

    def passes(name: str, value: str) -> bool:
        if any(name.startswith(kept) if kept.endswith("_") else name == kept for kept in keep):
            return True
        return not _FOREIGN.search(name) and not holds_secret(name, value)

    return {name: value for name, value in variables.items() if passes(name, value)}


def holds_secret(name: str, value: str) -> bool:
    """Say whether a variable looks like a credential. A proxy's login is none: a download needs it.

    >>> holds_secret("WANDB_API_KEY", "s"), holds_secret("DB", "pg://u:p@h"), holds_secret("WANDB_ENTITY", "team")
    (True, True, False)
    """
    return bool(_SECRET.search(name)) or (not name.lower().endswith("_proxy") and bool(_LOGIN.search(value)))


def read_secret(variables: Mapping[str, str], *names: str) -> str:
    r"""Return the first of these variables that is set, without the line end that a file leaves; empty for none.

    HTTP clients refuse a header with a line break in it and show it whole, key and all, in their error.

    >>> read_secret({"B": "key\n"}, "A", "B"), read_secret({"A": " "}, "A")
    ('key', '')

    Raises: SpecError for a value that no header can carry; it does not show it.
    """
    for name in names:
        value = variables.get(name, "").strip()
        if not (value.isascii() and value.isprintable()):
            raise SpecError(f"{name} holds a line break or another character that no HTTP header can: set it anew")
        if value:
            return value
    return ""


def is_secret_name(name: str) -> bool:
    """Say whether a variable of this name holds a credential.

    >>> is_secret_name("HF_TOKEN"), is_secret_name("NCCL_IB_PKEY"), is_secret_name("TOKENIZERS_PARALLELISM")
    (True, False, False)
    """
    return _SECRET.search(name) is not None


def is_secret_option(word: str) -> bool:
    """Say whether a word of a command line is an option that carries a key, with or without its value.

    >>> is_secret_option("--api-key=s"), is_secret_option("--api_key"), is_secret_option("--api-server-count")
    (True, True, False)
    """
    return _OPTION.fullmatch(word.partition("=")[0]) is not None


def hide_secrets(words: Iterable[str]) -> list[str]:
    """Return a command line as it may be shown; an option's key ends at the next option.

    >>> hide_secrets(["serve", "--api-key", "one", "two", "--port", "1", "--api-key=three"])
    ['serve', '--api-key', '***', '***', '--port', '1', '--api-key=***']
    """
    shown: list[str] = []
    hides = False
    for word in words:
        if word.startswith("--"):
            hides = is_secret_option(word)
            name, equals, _ = word.partition("=")
            shown.append(f"{name}=***" if hides and equals else word)
        else:
            shown.append("***" if hides else word)
    return shown
