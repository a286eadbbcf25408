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
_PAIR = re.compile(r"""([\w.]+)['"]?\s*[:=]\s*([^,{}]*)""")  # of a mapping in an override
_REFERENCE = re.compile(r"\$\{[^,{}]*\}")  # one with a comma may hold a default
_NUMBERS = re.compile(r"[\s\d.,e+\-\[\]]*|true|false|null", re.IGNORECASE)
_VOCABULARY = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|stop|image|video|audio)_tokens?", re.IGNORECASE)
_COLUMN = re.compile(  # data.prompt_key, algorithm.gdpo_reward_keys
    r"(data|distillation|reward|reward_model|algorithm)\.(?!.*(api|access|secret|private|auth)_?keys?$).*_keys?"
)
_NAMED = re.compile(r"""([\w-]+)['"]?\s*[=:]|--([\w-]+)""")  # in a shell line or an override
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
        is_proxy = name.lower().endswith("_proxy")
        return not _FOREIGN.search(name) and (is_proxy or not holds_secret(name, value))

    return {name: value for name, value in variables.items() if passes(name, value)}


def holds_secret(name: str, value: str) -> bool:
    """Say whether a variable looks like a credential; a proxy's login is one.

    >>> holds_secret("WANDB_API_KEY", "s"), holds_secret("DB", "pg://u:p@h"), holds_secret("WANDB_ENTITY", "team")
    (True, True, False)
    >>> holds_secret("HTTPS_PROXY", "http://proxy:3128"), holds_secret("HTTPS_PROXY", "ada:s@proxy:3128")
    (False, True)
    """
    is_proxy = name.lower().endswith("_proxy")
    return bool(_SECRET.search(name)) or holds_login(value) or (is_proxy and "@" in value)


def holds_login(text: str) -> bool:
    """Say whether a text holds a URL with a user, or a password of a connection.

    >>> holds_login("export ALL_PROXY=http://ada:s@proxy"), holds_login("pip install a @ https://h/a@1.whl")
    (True, False)
    """
    return _LOGIN.search(text) is not None


def secret_override(word: str) -> str:
    """Return the name of what a hydra override would set to a credential, "" when it sets none.

    In a trainer's config tokens are counted and keys name columns; what hydra itself takes from the environment is no
    credential yet.

    >>> secret_override("trainer.wandb_api_key=s"), secret_override("+a.runtime_env={env_vars:{HF_TOKEN:s}}")
    ('trainer.wandb_api_key', 'HF_TOKEN')
    >>> [secret_override(word) for word in ("a.max_token_len=8192", "a.api_key=${oc.env:KEY}", "data.prompt_key=q")]
    ['', '', '']
    """
    name, _, value = word.lstrip("+~").partition("=")
    for said, text in [(name, value), *_PAIR.findall(value)]:
        last = said.rpartition(".")[2]
        is_harmless = not text or _REFERENCE.fullmatch(text) or _VOCABULARY.fullmatch(last) or _COLUMN.fullmatch(said)
        is_counted = "token" in last.lower() and _NUMBERS.fullmatch(text)
        if is_secret_name(last) and not is_harmless and not is_counted:
            return said
    return name if holds_login(value) else ""


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


def hide_values(lines: Iterable[str]) -> list[str]:
    """Return shell lines or overrides as they may be shown: each that names a credential or holds a login ends there.

    >>> hide_values(["module load hpcx", "export HF_TOKEN=s", "curl --api-key s", "a=http://ada:s@h", "a={pat: s}"])
    ['module load hpcx', 'export HF_TOKEN=***', 'curl --api-key***', 'a=http***', 'a={pat:***']
    """
    shown: list[str] = []
    for line in lines:
        named = [found for found in _NAMED.finditer(line) if is_secret_name((found[1] or found[2]).replace("-", "_"))]
        ends = [found.end() for found in named] + [found.start() for found in _LOGIN.finditer(line)]
        shown.append(f"{line[: min(ends)]}***" if ends else line)
    return shown
