"""Find personal numbers in a text: phone, payment card, Japan's My Number.

    text -> runs of digits with their separators -> windows of whole groups -> [redacted:phone] ...

A number is looked for in whole groups of digits ("4111 1111 1111 1111 123" holds a card and a rest),
so a number beside another one is found too. Full-width digits and hyphens count, as people in Japan
type them. Linear: a run is scanned once, and a window has at most 8 groups.

Ring: pure.  Source: ISO/IEC 7812-1 (Luhn); 総務省令第八十五号 (My Number's check digit); the
Ministry of Internal Affairs' numbering plan (0AB-J: 10 digits, 0A0 and 0800: 11).
"""

import re
from collections.abc import Set

_D = "[0-9０-９]"
_GAP = "[-‐‑‒–—−ー－ 　.()（）]"
_RUN = re.compile(rf"[+＋]?{_D}(?:{_GAP}{{0,3}}+{_D})*+")
_GROUP = re.compile(rf"{_D}++")
_TO_ASCII = str.maketrans("０１２３４５６７８９＋", "0123456789+")
_MAX_GROUPS, _MIN_DIGITS, _MAX_DIGITS = 8, 9, 19
_ORDER = ("card", "my_number", "phone")  # the longer number wins


def take_numbers(text: str, kinds: Set[str]) -> tuple[str, dict[str, int]]:
    """Return the text with each number of these kinds replaced, and counts by kind.

    >>> take_numbers("電話は090-1234-5678です", {"phone"})
    ('電話は[redacted:phone]です', {'phone': 1})
    """
    counts: dict[str, int] = {}
    wanted = tuple(kind for kind in _ORDER if kind in kinds)

    def one(match: re.Match[str]) -> str:
        run = match[0]
        return run if len(run) < 9 else _take_from_run(match, wanted, counts)

    return _RUN.sub(one, text), counts


def _take_from_run(match: re.Match[str], wanted: tuple[str, ...], counts: dict[str, int]) -> str:
    run = match[0]
    groups = [(group.start(), group.end()) for group in _GROUP.finditer(run)]
    pieces: list[str] = []
    at, index = 0, 0
    while index < len(groups):
        start = groups[index][0]
        last = groups[min(index + _MAX_GROUPS, len(groups)) - 1][1]
        if last - start < _MIN_DIGITS:  # less room than digits are needed
            break
        plus = index == 0 and start > 0
        found = _longest(run, groups[index : index + _MAX_GROUPS], plus, wanted, _is_glued(match, index, groups))
        if found is None:
            index += 1
            continue
        kind, length = found
        end = groups[index + length - 1][1]
        pieces += [run[at : 0 if plus else start], f"[redacted:{kind}]"]
        counts[kind] = counts.get(kind, 0) + 1
        at, index = end, index + length
    return "".join([*pieces, run[at:]])


def _is_glued(match: re.Match[str], index: int, groups: list[tuple[int, int]]) -> tuple[bool, bool]:
    """Say whether letters touch the run at its begin and its end: `a03...` is an id, not a phone."""
    text = match.string
    before = text[match.start() - 1 : match.start()] if index == 0 else ""
    after = text[match.end() : match.end() + 1]
    return _is_letter(before), _is_letter(after)


def _is_letter(letter: str) -> bool:
    return letter.isascii() and (letter.isalnum() or letter == "_")


def _longest(
    run: str, groups: list[tuple[int, int]], plus: bool, wanted: tuple[str, ...], glued: tuple[bool, bool]
) -> tuple[str, int] | None:
    """Return (kind, number of groups) of the longest number that starts with the first group."""
    total = sum(end - start for start, end in groups)
    if total < _MIN_DIGITS or groups[0][1] - groups[0][0] > _MAX_DIGITS:
        return None
    number = "".join(run[start:end] for start, end in groups).translate(_TO_ASCII)
    for length in range(len(groups), 0, -1):
        number = number[:total]
        total -= groups[length - 1][1] - groups[length - 1][0]
        if not _MIN_DIGITS <= len(number) <= _MAX_DIGITS:
            continue
        touched = glued[0] or (glued[1] and groups[length - 1][1] == len(run))
        if touched and length == 1:
            continue
        for kind in wanted:
            if _IS[kind](number, plus):
                return kind, length
    return None


def is_card(number: str, plus: bool = False) -> bool:
    """Say whether the digits are a payment card's: 13..19 of them, a known first digit, Luhn.

    >>> is_card("4111111111111111"), is_card("4111111111111112")
    (True, False)
    """
    if plus or not 13 <= len(number) <= 19 or (number[0] not in "3456" and not "222100" <= number[:6] <= "272099"):
        return False
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_my_number(number: str, plus: bool = False) -> bool:
    """Say whether the digits are a Japanese Individual Number: 12 of them, the last a check digit.

    >>> is_my_number("123456789018"), is_my_number("123456789012")
    (True, False)
    """
    if plus or len(number) != 12:
        return False
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(digit) * weight for digit, weight in zip(number, weights, strict=False)) % 11
    return int(number[11]) == (0 if rest <= 1 else 11 - rest)


def is_phone(number: str, plus: bool = False) -> bool:
    """Say whether the digits are a phone number: Japan's own form, or international after a plus.

    >>> is_phone("0312345678"), is_phone("09012345678"), is_phone("819012345678", plus=True), is_phone("1700000000")
    (True, True, True, False)
    """
    if plus:
        return 9 <= len(number) <= 16 and number[0] != "0"  # +81 (0)90 ... has the trunk zero too
    if number.startswith("010"):
        return 12 <= len(number) <= 19  # international, dialled from Japan
    if number[:2] in ("00",) or number[0] != "0":
        return False
    if number[:3] in ("020", "050", "060", "070", "080", "090"):
        return len(number) == 11
    return len(number) == 10


_IS = {"card": is_card, "my_number": is_my_number, "phone": is_phone}
