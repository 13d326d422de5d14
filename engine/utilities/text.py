"""Pieces of one-line error messages."""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = {"site-packages", "dist-packages"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an unknown ``word``: the nearest of ``known``, or nothing if none is near.

    Example:
        >>> did_you_mean("shed", ["sgd", "adamw"]), did_you_mean("rmsprop", ["sgd", "adamw"])
        (", did you mean 'sgd'?", '')
    """
    close = nearest(word, known)
    return f", did you mean {close!r}?" if close else ""


def none_of(word: object, known: Iterable[str]) -> str:
    """The error for a ``word`` that is none of ``known``, with the nearest of them if one is near.

    Example:
        >>> none_of("shed", ["sgd", "adamw"]), none_of("rmsprop", ["sgd", "adamw"])
        ("'shed' is none of sgd, adamw; did you mean 'sgd'?", "'rmsprop' is none of sgd, adamw")
    """
    known = list(known)
    if not known:
        return f"{word!r} is unknown; there are none yet"
    return f"{word!r} is none of {', '.join(known)}{did_you_mean(str(word), known).replace(',', ';', 1)}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The one of ``known`` that is most like ``word``; empty if none is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), "")


def one_line(error: object, limit: int = 0) -> str:
    """The text of an error on one line, with single spaces; a ``limit`` above 0 cuts it after so many characters.

    An exception without any text, such as that of a bare ``assert``, is given by its type and the code that raised it.

    Example:
        >>> one_line("no such\\n    file", limit=10)
        'no such fi'
    """
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        code = [frame.line for frame in traceback.extract_tb(error.__traceback__)[-1:] if frame.line]
        text = ": ".join([type(error).__name__, *code])
    return text[:limit] if limit else text


def described(error: BaseException) -> str:
    """Type and text of an error on one line of at most some 300 characters.

    Example:
        >>> described(KeyError("mask")), described(AssertionError())
        ("KeyError: 'mask'", 'AssertionError')
    """
    name, text = type(error).__name__, one_line(error, 300)
    return text if text.startswith(name) else f"{name}: {text}"


def place(error: BaseException) -> str:
    """Where a user's code raised an error, or called what raised it, to append to a message; nothing if it did not.

    Code of this project, of Python itself and of installed packages is not the user's.
    """
    others = (
        *(f"{PROJECT / name}{os.sep}" for name in ("engine", "tasks", "tools")),
        sysconfig.get_path("stdlib"),
        "<",
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and not PACKAGES & set(Path(frame.filename).parts):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""
