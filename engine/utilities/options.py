"""Keys and values of a config, from a file or the command line, before a parser reads them; and its errors."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from engine.utilities.kinds import refusal
from engine.utilities.text import did_you_mean, nearest, one_line

ALONE = ("--help", "-h", "--print_config")
"""Options that need no value."""


def words(argv: Sequence[str]) -> list[str]:
    """Command-line words, with every ``--key=value`` split into two words."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]


def joined(argv: Sequence[str]) -> list[str]:
    """``argv``, as ``words`` gives it, with every key and its value in one word again.

    argparse would take the value in ``--optimizer.lr -1e-3`` for an option.

    Raises:
        ValueError: a key has no value, or a value no key.

    Example:
        >>> joined(["--optimizer.lr", "-1e-3", "--help"])
        ['--optimizer.lr=-1e-3', '--help']
    """
    found: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and word not in ALONE:
            raise ValueError(f"{word!r} belongs to no key; write --KEY VALUE, a value with spaces in quotes")
        if rest and not rest[0].startswith("--") and word not in ("--help", "-h"):
            word = f"{word}={rest.pop(0)}"
        elif word not in ALONE:
            raise ValueError(f"{word}: no value given")
        found.append(word)
    return found


def hints(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """The annotations of all sections and keys of a config class, by their dotted names."""
    found: dict[str, Any] = {}
    own = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        found[prefix + item.name] = own[item.name]
        if dataclasses.is_dataclass(own[item.name]):
            found |= hints(own[item.name], f"{prefix}{item.name}.")
    return found


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The sections of a config file and their keys, by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict) and not prefix:
            found |= flat(value, f"{key}.")
    return found


def check_keys(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Check that all dotted names are known.

    Raises:
        ValueError: a name is unknown. The message suggests the nearest known name, or lists those of the section.
    """
    known = list(known)
    for name in names:
        # Each auxiliary network has options of its own; ``build_auxiliary`` checks those.
        if name not in known and not name.startswith("local.auxiliary."):
            raise ValueError(f"{where}unknown key {name!r}{_suggestion(name, known) or _spaceless(name)}")


def _suggestion(name: str, known: Sequence[str]) -> str:
    if ":" in name:
        return _spaceless(name)
    section, _, key = name.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    elsewhere = [other for other in known if other.rpartition(".")[2] == key]
    if close := nearest(key, beside):
        return f", did you mean {beside[close]!r}?"
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    if not beside or not section:
        return did_you_mean(name, known) or f"; known: {', '.join(beside)}"
    return f"; known: {', '.join(beside.values())}"


def _spaceless(text: str) -> str:
    key, _, value = text.rpartition(".")[2].partition(":")
    return f": YAML needs a space after the colon: {key}: {value}"


def colon_hint(value: Any) -> str:
    """A hint to append to an error if YAML has read ``{key:value}`` as a key without a value, or as text.

    Example:
        >>> colon_hint({"vangogh:works": None}), colon_hint("blocks:3 cut:[]"), colon_hint({"vangogh": "works"})
        (': YAML needs a space after the colon: vangogh: works', ': YAML needs a space after the colon: blocks: 3', '')
    """
    if isinstance(value, str) and re.match(r"\w+:[^\s/\\]", value):
        return _spaceless(value.split()[0])
    if not isinstance(value, Mapping):
        return ""
    bare = [str(key) for key, each in value.items() if each is None and re.match(r"\w+:[^\s/\\]", str(key))]
    return _spaceless(bare[0]) if bare else next(filter(None, map(colon_hint, _mappings(value))), "")


def _mappings(value: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    return [each for each in value.values() if isinstance(each, Mapping)]


def loaded(text: str) -> Any:
    """The value of a word on the command line, read as YAML; the text itself if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parser_message(error: Exception, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The message of a jsonargparse error, as one line that begins with the key.

    Args:
        known: the annotations of all keys.
        given: the values of the keys that were given.
    """
    text = one_line(error)
    match = re.match(r"Parser key \"?([\w.]+)\"?:", text)
    if match and match[1] in known and match[1] in given:
        return refusal(match[1], known[match[1]], given[match[1]])
    return re.sub(r"^Parser key \"?([\w.]+)\"?:", r"\1:", text)
