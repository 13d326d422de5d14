"""Pieces of one-line error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an unknown ``word``: the nearest of ``known``, or nothing if none is near.

    Example:
        >>> did_you_mean("shed", ["sgd", "adamw"]), did_you_mean("rmsprop", ["sgd", "adamw"])
        (", did you mean 'sgd'?", '')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def one_line(error: object, limit: int = 0) -> str:
    """The text of an error on one line, with single spaces; a ``limit`` above 0 cuts it after so many characters.

    An exception without any text, such as that of a bare ``assert``, is given by its type.

    Example:
        >>> one_line("no such\\n    file", limit=10)
        'no such fi'
    """
    text = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, BaseException) else "")
    return text[:limit] if limit else text
