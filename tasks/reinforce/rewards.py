"""Rewards: what a completion is worth, each with its range; a recipe names them and gives them weights.

    RewardSpec(name="number", weight=2.0, arguments={"partial": 0.5}) -> make_reward() -> [Said] -> [float]

| name | range | 1 means |
|---|---|---|
| exact | 0 or 1 | the text is the answer, but for width, case, spaces and a full stop |
| number | 0 to 1 | the last number (digits or kanji) is the answer's; a near one has up to `partial` |
| format | 0 or 1, with `tags` 0 to 1 | the text matches `pattern`, or each tag opens and closes once |
| characters | 0 to 1 | every character is one of `pattern` (a class such as [0-9]) |
| length | 0 to 1 | `least` to `most` characters; falls to 0 at twice `most` |
| language | 0 to 1 | every letter is Japanese (`language` ja) or Latin (en) |
| finished | 0 or 1 | the model ended its answer itself |

Ring: pure.
"""

import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from tasks.errors import SpecError
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec

RewardFn = Callable[[Sequence[Said]], list[float]]
_KANJI = {numeral: value for value, numeral in enumerate("〇一二三四五六七八九")}
_TENS = {"十": 10, "百": 100, "千": 1000}
_NUMBER = re.compile(rf"[-+−]?\d+(?:,\d{{3}})*(?:\.\d+)?|[{''.join((*_KANJI, *_TENS))}]+")
_LETTERS = {
    "ja": re.compile(r"[ぁ-ゖァ-ヺー一-鿿々]"),
    "en": re.compile(r"[A-Za-z]"),
}


def exact(said: Said) -> float:
    """Return 1 when the text is the answer.

    >>> exact(_said("８ 。", answer="8")), exact(_said("9", answer="8"))
    (1.0, 0.0)
    """
    return float(_plain(said.text) == _plain(said.answer))


def number(said: Said, partial: float = 0.0, scale: float = 1.0) -> float:
    """Return 1 when the last number of the text is that of the answer, else `partial` of how near it is.

    A number that is off by `scale` has half of `partial`. Raises SpecError when the answer holds no number.

    >>> [number(_said(text, answer="1,200"), partial=0.5) for text in ("答えは１２００です", "1201", "知りません")]
    [1.0, 0.25, 0.0]
    """
    wanted, given = last_number(said.answer), last_number(said.text)
    if wanted is None:
        raise SpecError(
            f"the reward 'number' compares with a number, but the answer {said.answer[:60]!r} of {said.question[:60]!r}"
            " holds none: use 'exact', or mend the data"
        )
    if given is None:
        return 0.0
    off = abs(given - wanted)
    return 1.0 if off <= 1e-9 * max(1.0, abs(wanted)) else partial / (1.0 + off / scale)


def form(said: Said, pattern: str = "", tags: Sequence[str] = ()) -> float:
    """Return 1 when the whole text matches `pattern`; with `tags` the share of them that open and close once, in order.

    >>> form(_said("42"), pattern="[0-9]+"), form(_said("about 42"), pattern="[0-9]+")
    (1.0, 0.0)
    >>> form(_said("<think>3+5</think><answer>8"), tags=["think", "answer"])
    0.5
    """
    if not tags:
        return float(bool(re.fullmatch(pattern, said.text.strip(), re.DOTALL)))
    place, good = 0, 0
    for tag in tags:
        opened, closed = said.text.find(f"<{tag}>", place), said.text.find(f"</{tag}>", place)
        is_once = said.text.count(f"<{tag}>") == 1 == said.text.count(f"</{tag}>")
        if is_once and 0 <= opened < closed:
            place, good = closed, good + 1
    return good / len(tags)


def characters(said: Said, pattern: str = "[0-9]") -> float:
    """Return the share of characters that match `pattern`, spaces left out; 0 of an empty text.

    >>> characters(_said("12 です")), characters(_said(""))
    (0.5, 0.0)
    """
    shown = [character for character in said.text if not character.isspace()]
    return sum(bool(re.fullmatch(pattern, character)) for character in shown) / len(shown) if shown else 0.0


def length(said: Said, most: int = 200, least: int = 1) -> float:
    """Return 1 for `least` to `most` characters, falling to 0 at twice `most`, and below `least` in proportion.

    >>> [length(_said("a" * count), most=4, least=2) for count in (1, 3, 6, 9)]
    [0.5, 1.0, 0.5, 0.0]
    """
    count = len(said.text.strip())
    if count < least:
        return count / least
    return max(0.0, min(1.0, 2.0 - count / most))


def language(said: Said, language: Literal["ja", "en"] = "ja", without: float = 0.0) -> float:
    """Return the share of letters that are of the language; `without` for a text without letters.

    >>> language(_said("答えは8です")), language(_said("the 答え")), language(_said("8"))
    (1.0, 0.4, 0.0)
    """
    letters = [character for character in said.text if character.isalpha()]
    return sum(bool(_LETTERS[language].match(letter)) for letter in letters) / len(letters) if letters else without


def finished(said: Said) -> float:
    """Return 1 when the model ended its answer itself, 0 when it was cut off.

    >>> finished(_said("8"))
    1.0
    """
    return float(said.is_finished)


REWARDS: dict[str, Callable[..., float]] = {
    "exact": exact,
    "number": number,
    "format": form,
    "characters": characters,
    "length": length,
    "language": language,
    "finished": finished,
}


def make_reward(spec: RewardSpec) -> RewardFn:
    """Return a reward of this module with its arguments.

    Raises: SpecError for an unknown name or argument, a value of the wrong kind, a pattern that is none.

    >>> make_reward(RewardSpec(name="finished"))([_said("8"), _said("9")])
    [1.0, 1.0]
    >>> make_reward(RewardSpec(name="number", arguments={"part": 1}))
    Traceback (most recent call last):
    ...
    tasks.errors.SpecError: reward 'number' takes no argument 'part': it takes partial, scale
    """
    found = REWARDS.get(spec.name)
    if found is None:
        raise SpecError(
            f"there is no reward {spec.name!r}: choose one of {', '.join(REWARDS)}, judge, or name your own function "
            "as package.module:function"
        )
    takes = list(inspect.signature(found).parameters)[1:]
    for name in spec.arguments:
        if name not in takes:
            raise SpecError(f"reward {spec.name!r} takes no argument {name!r}: it takes {', '.join(takes) or 'none'}")
    probe = Said(question="1?", answer="1", text="1", whole="1", num_tokens=1, is_finished=True)
    try:
        for said in (probe, replace(probe, text="2"), replace(probe, text="")):  # each branch
            float(found(said, **spec.arguments))
    except (TypeError, ValueError, KeyError, ZeroDivisionError, re.error) as error:
        raise SpecError(f"reward {spec.name!r} can't work with {spec.arguments}: {error}") from error
    if spec.name == "format" and not (spec.arguments.get("pattern") or spec.arguments.get("tags")):
        raise SpecError("reward 'format' needs a pattern (a regular expression) or tags")
    return lambda batch: [found(said, **spec.arguments) for said in batch]


def last_number(text: str) -> float | None:
    """Return the last number of a text: full-width digits, thousands and kanji numerals below 10,000 are read.

    >>> last_number("1,234 と −５"), last_number("七月二十三日"), last_number("なし")
    (-5.0, 23.0, None)
    """
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    if not found:
        return None
    last = found[-1]
    return (
        _read_kanji(last) if last[0] in _KANJI or last[0] in _TENS else float(last.replace(",", "").replace("−", "-"))
    )


def _read_kanji(numerals: str) -> float:
    """Return 123 of 百二十三 and of 一二三."""
    total, waiting = 0, 0
    for numeral in numerals:
        if numeral in _KANJI:
            waiting = 10 * waiting + _KANJI[numeral]
        else:
            total, waiting = total + (waiting or 1) * _TENS[numeral], 0
    return float(total + waiting) if len(numerals) < 300 else math.inf  # a model that repeats itself


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold().rstrip("。.")


def _said(text: str, answer: str = "", **changes: Any) -> Said:  # Any: fields of Said
    """A completion for the examples above."""
    values = {"question": "", "whole": text, "num_tokens": len(text), "is_finished": True} | changes
    return Said(text=text, answer=answer, **values)
