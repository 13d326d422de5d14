"""A CLIP tokenizer that needs no download, for models made on the spot."""

from __future__ import annotations

import itertools
import json
import tempfile
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
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            merges["".join(pieces[:end]), pieces[end]] = None
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = dict(zip(dict.fromkeys(tokens), itertools.count(), strict=False))
    with tempfile.TemporaryDirectory() as room:
        vocabulary, rules = Path(room, "vocab.json"), Path(room, "merges.txt")
        vocabulary.write_text(json.dumps(numbers))
        rules.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=LENGTH)
