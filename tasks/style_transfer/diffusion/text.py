"""Encode texts for the denoiser's cross-attention, with learnt vectors in place of placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

PLACEHOLDER = "*"


def tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (texts, length), padded; texts that are too long for the text model are cut."""
    length = tokenizer.model_max_length
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    return torch.tensor(found.input_ids)


def template_text(template: str, artist: str, count: int) -> str:
    """``template`` with the artist's name in place of ``{artist}`` and ``count`` placeholders in place of ``*``.

    Example:
        >>> template_text("a painting by {artist} *", "monet", 2)
        'a painting by monet * *'
    """
    return template.replace(PLACEHOLDER, " ".join([PLACEHOLDER] * count)).replace("{artist}", artist)


def check_template(key: str, template: str) -> None:
    """Check that a template has exactly one placeholder.

    Raises:
        ValueError: it has none or several.
    """
    if template.split().count(PLACEHOLDER) != 1 or template.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"{key}: {template!r} must have one {PLACEHOLDER!r}, a word of its own, which the prompt replaces"
        )


def placeholders(tokenizer: CLIPTokenizer, ids: Tensor, count: int) -> Tensor:
    """Which of the tokens ``ids`` (texts, length) are placeholders.

    Raises:
        ValueError: a text does not have ``count`` placeholders, since it is too long for the text model.
    """
    (number,) = tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids
    mask: Tensor = ids == number
    if not bool((mask.sum(1) == count).all()):
        raise ValueError(
            f"prompt.template: with the artist's name and {count} placeholders it has more than the "
            f"{ids.shape[1]} tokens that the text model takes; shorten it, or lower prompt.tokens"
        )
    return mask


def encode(encoder: CLIPTextModel, ids: Tensor, mask: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """What cross-attention reads for each text: (texts, length, width).

    Args:
        ids: tokens (texts, length).
        mask: which tokens are placeholders (texts, length); ``vectors`` replace them from left to right.
        vectors: what replaces the placeholders (texts, placeholders, width), scaled like token embeddings.
    """
    if vectors is None or mask is None:
        result: Tensor = encoder(ids).last_hidden_state
        return result
    place = (mask.long().cumsum(1) - 1).clamp(0, vectors.shape[1] - 1)
    spread = vectors.gather(1, place[..., None].expand(-1, -1, vectors.shape[2]))

    def put(_: Any, __: Any, embeddings: Tensor) -> Tensor:
        return torch.where(mask[..., None], spread.to(embeddings.dtype), embeddings)

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        found: Tensor = encoder(ids).last_hidden_state
        return found
    finally:
        handle.remove()
