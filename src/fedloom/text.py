"""Text of others made fit to print: no character that a terminal obeys, and no more of it than a person reads."""

from __future__ import annotations

import unicodedata

MOST_LINES = 12
_LONGEST_LINE = 1000
_LONGEST_VALUE = 80


def printable(text: str) -> str:
    r"""The text with control, format and surrogate characters as their escapes; lines and tabs stay.

    >>> printable("a\x1b]0;title\x07 b\nc")
    'a\\x1b]0;title\\x07 b\nc'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _obeyed(c) else c.encode("unicode_escape").decode() for c in text)


def _obeyed(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def message(text: str) -> str:
    """A message of at most 12 printable lines; what is too long is cut in the middle, so that its advice stays."""
    lines = [shortened(line, _LONGEST_LINE) for line in printable(text).split("\n")]
    if len(lines) > MOST_LINES:
        rest = len(lines) - MOST_LINES + 1
        lines = [*lines[: MOST_LINES - 1], f"... and {rest} more lines"]
    return "\n".join(lines)


def shortened(text: str, most: int) -> str:
    """The text, or its two ends around dots where it has more than `most` characters.

    >>> shortened("abcdefghij", 7)
    'ab...ij'
    """
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def shown(value: object, most: int = _LONGEST_VALUE) -> str:
    """A value in a message: its repr on one line, at most so long."""
    try:
        return shortened(printable(repr(value)), most)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested without end
        return f"a {type(value).__name__} too large to show"
