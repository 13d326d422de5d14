"""A CLIP tokenizer that needs no download, for models made on the spot."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = (
    *("a", "an", "by", "in", "of", "the", "and", "with"),
    *("photograph", "painting", "texture", "picture", "portrait", "landscape", "style"),
    *("dark", "dim", "bright", "grey", "pale", "vivid", "flat", "rough", "smooth", "contrasting"),
    *("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink", "brown"),
    *("van", "gogh", "monet", "vincent", "claude", "vangogh", "artist"),
)
"""Tokens of their own; any other word is taken letter by letter."""
LENGTH = 32
"""Tokens of a text, start and end included."""


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with ``WORDS`` for its merges.

    Example:
        >>> tiny_tokenizer().tokenize("a painting by zoe *")
        ['a</w>', 'painting</w>', 'by</w>', 'z', 'o', 'e</w>', '*</w>']
    """
    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        # Each rule is added last, so that words before go on being one token.
        while len(pieces := _merged(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = dict(zip(dict.fromkeys(tokens), itertools.count(), strict=False))
    with tempfile.TemporaryDirectory() as room:
        vocabulary, rules = Path(room, "vocab.json"), Path(room, "merges.txt")
        vocabulary.write_text(json.dumps(numbers))
        rules.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=LENGTH)


def _merged(word: str, merges: Mapping[tuple[str, str], int]) -> list[str]:
    """What byte-pair encoding makes of a word: of the pairs side by side the first of ``merges`` goes first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while known := [pair for pair in itertools.pairwise(pieces) if pair in merges]:
        best, rest, pieces = min(known, key=merges.__getitem__), pieces, []
        while rest:
            both = tuple(rest[:2]) == best
            pieces.append("".join(rest[: 1 + both]))
            rest = rest[1 + both :]
    return pieces
