"""Write names that others chose (data sets, folders, modules) so that they break neither Markdown nor a table.

Ring: pure.
"""

import re


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
