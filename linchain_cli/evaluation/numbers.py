"""Numbers as people and models write them, read off a text.

`last_number` is the published rule: what the LLM-Adapters scripts count. `stated_number` looks first for what
the text says its answer is, and reads thousands, decimals, signs, fractions, percent and powers of ten.
"""

from __future__ import annotations

import re

NUMBER_TOLERANCE = 1e-3

_STRICT = re.compile(r"-?\d+\.?\d*")

# Digits with separators of thousands (comma, apostrophe, a no-break space), or plain; a point or a comma in
# front of decimals; a power of ten.
_WHOLE = r"(?:\d{1,3}(?:[,'’\u00a0\u202f]\d{3})+(?!\d)|\d+)"
_PLAIN = rf"(?<!\d,){_WHOLE},\d{{1,2}}(?![\d,])|{_WHOLE}(?:\.\d+)?|\.\d+"
_POWER = r"(?:[eE][+-]?\d+|\s*(?:[×x*]|\\times)\s*10\s*(?:\^|\*\*)\s*\{?[+-]?\d+\}?)?"
_FRACTION = r"\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|\d+\s+\d+/\d+(?![\d/])|(?<![\d/])\d+/\d+(?![\d/])"
# A hyphen between two numbers or words is no sign.
_NUMBER = re.compile(
    rf"(?:(?<![\w.,)])[-+−–]\s?)?(?:\\?[$€£]\s?[-−]?)?(?:{_FRACTION}|(?:{_PLAIN}){_POWER})(?:\s?\\?%)?"
)
_STATEMENT = re.compile(
    r"####|\\boxed\s*\{|\banswer\b(?:\s+\w+){0,4}?\s*(?:\bis\b|\bare\b|\bequals\b|[:=])[\s:=*$(]*"
    r"(?:\\boxed\s*\{|about\s|approximately\s|just\s)?",
    re.IGNORECASE,
)


def last_number(text: str) -> str | None:
    """The last number, thousands separators taken out before."""
    found = _STRICT.findall(text.replace(",", ""))
    return found[-1] if found else None


def stated_number(text: str) -> str | None:
    """The number of the last statement ("The answer is 1,250.", "#### 72", "\\boxed{3/4}"), else the last."""
    for statement in reversed(list(_STATEMENT.finditer(text))):
        end = text.find("\n", statement.end())
        sentence = text[statement.end() : end if end >= 0 else None]
        if found := _NUMBER.search(sentence):
            return found.group().strip()
    found = [match.group() for match in _NUMBER.finditer(text)]
    return found[-1].strip() if found else None


def value_of(number: str) -> float | None:
    """What a number that `stated_number` found is worth; of a percentage the number before its sign."""
    text = re.sub(r"[\s$€£'’%\\]|(?<=\d),(?=\d{3}(?!\d))", "", _mixed(number)).replace(",", ".")
    text = text.replace("−", "-").replace("–", "-").replace("--", "")
    text = re.sub(r"d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?:×|x|\*|times)10(?:\^|\*\*)\{?([+-]?\d+)\}?", r"e\1", text)
    sign, _, whole = text.rpartition("&")
    parts = whole.partition("/")
    try:
        value = float(parts[0]) / (float(parts[2]) if parts[2] else 1.0)
        if sign:
            units = float(sign)
            value = units - value if sign.startswith("-") else units + value
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value


def _mixed(number: str) -> str:
    """`1 1/2` with a mark between its parts."""
    return re.sub(r"(\d)\s+(?=\d+/\d)", r"\1&", number)


def is_number(number: str | None, answer: str) -> bool:
    """Whether a number in a text is the answer; 50 % is 50, and it is 0.5."""
    value = None if number is None else value_of(number)
    if value is None:
        return False
    values = (value, value / 100) if "%" in number else (value,)
    return any(abs(one - float(answer)) <= NUMBER_TOLERANCE for one in values)
