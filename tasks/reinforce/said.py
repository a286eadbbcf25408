"""What a model said, as a reward sees it: the question, the answer's own text, the reference.

    harmony: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>TEXT<|return|> -> TEXT
    others:  the text as it is

Ring: pure.
"""

import re
from dataclasses import dataclass

IN_REWARD = "reward"  # the phase of the heartbeat, with the reward's name behind
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")
_CHANNEL = re.compile(r"<\|channel\|>\w+[^<]*<\|message\|>")
_USER = re.compile(r"<\|start\|>user<\|message\|>(.*?)<\|end\|>", re.DOTALL)
_CONTROL = re.compile(r"<\|[^|>]{1,40}\|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One completion. `text` is what a person would read, `whole` everything with its control tokens."""

    question: str
    answer: str
    text: str
    whole: str
    num_tokens: int
    is_finished: bool


def answer_text(whole: str) -> str:
    """Return what a person reads of a completion: of harmony the final channel, "" where none was opened.

    >>> answer_text("<|channel|>analysis<|message|>3+5<|end|><|start|>assistant<|channel|>final<|message|>8<|return|>")
    '8'
    >>> answer_text("<|channel|>analysis<|message|>I think")
    ''
    >>> answer_text("8<|im_end|>")
    '8'
    """
    opened = [found.end() for found in _FINAL.finditer(whole)]
    if opened:
        return _CONTROL.split(whole[opened[-1] :], maxsplit=1)[0]
    return "" if _CHANNEL.search(whole) else _CONTROL.sub("", whole)


def question_text(prompt: str) -> str:
    """Return the last question of a rendered prompt; of other templates than harmony's the whole without its tokens.

    >>> question_text("<|start|>system<|message|>...<|end|><|start|>user<|message|>3+5は?<|end|><|start|>assistant")
    '3+5は?'
    """
    asked = _USER.findall(prompt)
    return asked[-1] if asked else _CONTROL.sub(" ", prompt).strip()
