"""What can go wrong, as a tree. Every message says what was got, what was expected and what to do.

FedloomError
├── ConfigError     (ValueError)    a run file, an option or a budget is wrong
├── DataError       (ValueError)    a data file or data set cannot be used
├── ModelError      (ValueError)    a model cannot be loaded or adapted
├── HubError        (OSError)       a hub was needed and could not be reached
├── RunError        (RuntimeError)  a run directory cannot be used: exists, unreadable, other version, disk full
├── MethodError     (TypeError)     a method breaks the interface
└── RoundError      (RuntimeError)  a round could not be completed; the run can be resumed
    └── VoidRound                   and must not be done again: it counts as one that changed nothing

`exit_code` is what the command line returns: 2 where the user's input is at fault, 1 otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from fedloom import text


class FedloomError(Exception):
    """Base of every error that fedloom raises on purpose. Its message is printable, and of at most 12 lines."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(text.message(message))


class ConfigError(FedloomError, ValueError):
    """A run file, an option or a client's budget is wrong."""


class DataError(FedloomError, ValueError):
    """A data file or data set cannot be used as asked."""


class ModelError(FedloomError, ValueError):
    """A model cannot be loaded, or has no layer to adapt as asked."""


class HubError(FedloomError, OSError):
    """A model or data set is not on this machine and its hub cannot be reached."""


class RunError(FedloomError, RuntimeError):
    """A run directory cannot be written, read or gone on with."""


class MethodError(FedloomError, TypeError):
    """A method breaks the interface: the message says how to mend it."""


class RoundError(FedloomError, RuntimeError):
    """A round had no usable upload. The last checkpoint stands and the run can be resumed."""

    exit_code: ClassVar[int] = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or the empty string.

    >>> nearest("fslorra", ["fedit", "fslora"])
    "; did you mean 'fslora'?"
    >>> nearest("zzz", ["fedit"])
    ''
    """
    # A word of kilobytes is no misspelling, and the search for its like takes minutes.
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1) if len(word) <= 100 else []
    return f"; did you mean {close[0]!r}?" if close else ""


class VoidRound(RoundError):
    """A round that failed and must not be repeated, for its secure sum may have been opened: it changes nothing."""
