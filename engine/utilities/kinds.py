"""What a type annotation accepts, in words, and the error for a value that it does not accept."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from engine.utilities.text import none_of

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "names"),
    bool: ("true or false", "true or false"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    type(None): ("null", "null"),
}
"""For each type: one value, and several in a list."""


def refusal(name: str, hint: Any, value: object) -> str:
    """The error for a ``value`` of ``name``, of which the annotation is ``hint``.

    Example:
        >>> refusal("optimizer.name", Literal["sgd", "adamw"], "sdg")
        "optimizer.name: 'sdg' is none of sgd, adamw; did you mean 'sgd'?"
        >>> refusal("local.balance", Literal["units", "parameters"] | list[float], "unit")
        "local.balance: 'unit' is not a list of numbers, and none of units, parameters; did you mean 'units'?"
        >>> refusal("train.epochs", int, 1.5)
        'train.epochs: 1.5 is not a whole number'
    """
    choices = [str(choice) for part in _parts(hint) if typing.get_origin(part) is Literal for choice in part.__args__]
    kinds = [_kind(part) for part in _parts(hint) if typing.get_origin(part) is not Literal]
    said = [f"is not {' or '.join(kinds)}"] if kinds else []
    listed = [none_of(value, choices).removeprefix(f"{value!r} ")] if choices else []
    return f"{name}: {value!r} {', and '.join([*said, *listed]).replace('and is none', 'and none')}"


def takes_none(hint: Any) -> bool:
    """Whether None is a value for this annotation."""
    return any(part in (None, type(None), Any) for part in _parts(hint))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if dataclasses.is_dataclass(origin):
        return "a section of keys"
    if origin is list and arguments and arguments[0] in WORDS:
        return f"a list of {WORDS[arguments[0]][1]}"
    return WORDS[origin][0] if origin in WORDS else str(getattr(hint, "__name__", hint)).replace("typing.", "")
