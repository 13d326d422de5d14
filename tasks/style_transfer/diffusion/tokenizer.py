"""A CLIP tokenizer that needs no download, for untrained models."""

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
"""Words with a token of their own; any other word is split into letters."""
LENGTH = 32
"""Number of tokens in a text, start and end included."""


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with merges for ``WORDS``.

    Example:
        >>> tiny_tokenizer().tokenize("a painting by zoe *")
        ['a</w>', 'painting</w>', 'by</w>', 'z', 'o', 'e</w>', '*</w>']
    """
    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        # New rules come last, so that earlier words remain single tokens.
        while len(pieces := _merged(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = dict(zip(dict.fromkeys(tokens), itertools.count(), strict=False))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps(numbers))
        rules.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=LENGTH)


def _merged(word: str, merges: Mapping[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after byte-pair encoding, which always merges the adjacent pair first in ``merges``."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while known := [pair for pair in itertools.pairwise(pieces) if pair in merges]:
        best, rest, pieces = min(known, key=merges.__getitem__), pieces, []
        while rest:
            both = tuple(rest[:2]) == best
            pieces.append("".join(rest[: 1 + both]))
            rest = rest[1 + both :]
    return pieces
