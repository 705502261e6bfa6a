"""What to do about an error, in Chinese: errors are in English, docs/messages_zh.md explains each, and travels with the package."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ...ground.travelling import travelling

_ROW = re.compile(r"^\| (.*`.*) \| (.+) \|$", re.MULTILINE)
_QUOTE = re.compile(r"`([^`]+)`")
_SEE = re.compile(r"见\[([^]]+)\]\([^)]+\)")
_LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
_OF_PYTHON = re.compile(r"Python 里的[^。]*也会报[^。]*。")
"""a sentence about errors that no page shows"""
_AS_ABOVE = re.compile(r"^同上[，。：]?")
_HOLE = "…"
_FEWEST_LETTERS = 10
"""that an error and a quote must have in common in one piece"""


class _Quote(NamedTuple):
    pattern: re.Pattern[str]
    letters: int
    """of it that are not holes"""
    advice: str


def advice(message: str) -> str | None:
    """What the page says of a message, by the quote that has most in common with it; None if none has, or rows compete.

    >>> advice("kt_num_threads must be a positive whole number or auto")
    '改正数值，或去掉该参数。'
    """
    fitting = [quote for quote in _quotes() if quote.pattern.search(message)]
    most = max((quote.letters for quote in fitting), default=0)
    found = {quote.advice for quote in fitting if quote.letters == most}
    return found.pop() if len(found) == 1 else None


@cache
def _quotes() -> tuple[_Quote, ...]:
    """The quotes of the page's tables, with what stands beside them."""
    quotes, above = [], ""
    for messages, explained in _ROW.findall(travelling("docs/messages_zh.md").read_text(encoding="utf-8")):
        said = _QUOTE.sub(r"\1", _LINK.sub(r"\1", _SEE.sub("见文档“\\1”", _OF_PYTHON.sub("", explained))))
        if _AS_ABOVE.match(said):
            said = above + _AS_ABOVE.sub("", said)
        for quote in _QUOTE.findall(messages):
            parts = [part.strip(" .") for part in quote.split(_HOLE)]
            if max(map(len, parts)) >= _FEWEST_LETTERS and " " in quote:  # and no exception's name
                quotes.append(_Quote(re.compile(".*?".join(map(re.escape, parts))), sum(map(len, parts)), said))
        above = said
    return tuple(quotes)
