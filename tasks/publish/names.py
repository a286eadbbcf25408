"""Write names that others chose (data sets, folders, modules) so that they break neither Markdown nor a table.

A published name tells nothing of the machine: of a path only its last part, of a run nothing of where it ran.

Ring: pure.
"""

import re
from pathlib import PurePath
from typing import Any

from tasks.environment import holds_secret, secret_override

_NAMED = frozenset({"source", "validation_source", "test_source", "corpus", "tokenizer", "critic_model"})
_OF_THE_PLACE = ("NCCL_", "GLOO_", "UCX_", "RAY_")  # variables that name networks and hosts, as proxies do


def hub_id(name: str) -> str:
    """Return `name` when it can only be a repository of the Hub (owner/name), else "".

    >>> hub_id("openai/gpt-oss-20b"), hub_id("./rows.jsonl"), hub_id("data/rows.csv"), hub_id("shipped")
    ('openai/gpt-oss-20b', '', '', '')
    """
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", name)
    return name if is_id and not name.endswith((".jsonl", ".json", ".csv", ".parquet", ".txt")) else ""


def hub_origin(origin: str) -> tuple[str, str]:
    """Return (owner/name, commit) of a base from the Hub, two empty texts for one that was made here or is a folder.

    >>> hub_origin("openai/gpt-oss-20b@6cee5e"), hub_origin("/models/base"), hub_origin("pretrained 0123abcd")
    (('openai/gpt-oss-20b', '6cee5e'), ('', ''), ('', ''))
    """
    name, _, commit = origin.rpartition("@")
    return (name, commit) if hub_id(name) else ("", "")


def without_folder(name: str) -> str:
    """Return a name as strangers may read it: of a file or folder of this machine only its last part.

    >>> without_folder("/home/ada/rows.csv"), without_folder("~/corpus/"), without_folder("openai/gpt-oss-20b@6cee5e")
    ('rows.csv', 'corpus', 'openai/gpt-oss-20b@6cee5e')
    """
    return name if hub_id(name) or hub_origin(name)[0] else PurePath(name).name or name


def shown_spec(spec: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
    """Return knobs as strangers may read them: not where they ran, no folder of this machine, no credential.

    Specs refuse credentials; those of older versions took a proxy's login.

    >>> shown_spec({"source": "/home/ada/rows.csv", "launch": {"account": "a"}, "overrides": ["path=/home/r.py"]})
    {'source': 'rows.csv', 'overrides': ['path=r.py']}
    >>> shown_spec({"environment": {"NVTE_FUSED_ATTN": "0", "HTTPS_PROXY": "http://proxy:3128"}})
    {'environment': {'NVTE_FUSED_ATTN': '0'}}
    """
    shown = {name: value for name, value in spec.items() if name != "launch"}
    shown |= {name: without_folder(shown[name]) for name in _NAMED & shown.keys()}
    if "environment" in shown:
        shown["environment"] = {name: said for name, said in shown["environment"].items() if _is_told(name, said)}
    if "overrides" in shown:
        shown["overrides"] = [_shown_override(word) for word in shown["overrides"] if not secret_override(word)]
    return shown


def _is_told(name: str, value: str) -> bool:
    return not (name.startswith(_OF_THE_PLACE) or name.lower().endswith("_proxy") or holds_secret(name, value))


def _shown_override(word: str) -> str:
    name, equals, value = word.partition("=")
    return name + equals + (without_folder(value) if value.startswith(("/", "~/")) else value)


def one_line(text: str) -> str:
    r"""Return `text` on one line, with nothing that can't be printed or written as UTF-8.

    >>> one_line("a\n| b\x00\ud800")
    'a | b'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def code(text: str) -> str:
    r"""Return `text` as inline code, which no Markdown, HTML or table cell inside can leave.

    >>> print(code("rows|2024"), code("a`b"))
    `rows\|2024` ``a`b``
    """
    line = re.sub(r"\\*\|", r"\|", one_line(text))  # a backslash of its own before a pipe would free the pipe
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str, language: str) -> str:
    """Return `text` as a fenced block, whatever backticks it holds."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
