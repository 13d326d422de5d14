"""The Implicit Style Prompt Bank's prompts: a matrix an artist, and the attention that turns it into a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.style_transfer.diffusion.bank import Prompt

TEMPLATE = "a painting by {artist} *"
"""The coarse prompt; what is learnt replaces the embedding of ``*``."""
FORMS = ("ssam", "released")


class SSAM(nn.Module):
    """The Spatial-Statistical self-Attention Module: attention that gives a mean and a deviation (arXiv 2312.06135).

    The paper names it and its place; the arithmetic, after its name and the attention statistics of AdaAttN (Liu et
    al. 2021), is ours::

        A = softmax(Q K^T / sqrt(d)),  M = A V,  S = sqrt(relu(A (V * V) - M * M)),  output = S * Norm(I) + M

    Maps (n, d) to (n, d).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, matrix: Tensor) -> Tensor:
        query, key, value = self.query(matrix), self.key(matrix), self.value(matrix)
        attention = (query @ key.T / math.sqrt(matrix.shape[1])).softmax(1)
        mean = attention @ value
        variance = attention @ (value * value) - mean * mean
        # A root has no slope at 0, where one row takes all attention.
        return (F.relu(variance) + 1e-6).sqrt() * F.layer_norm(matrix, matrix.shape[1:]) + mean


class SSAMPrompt(Prompt):
    """A matrix of ``rows`` x width through SSAM, pooled to as many vectors as the template has placeholders."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        rows, width = settings["rows"], settings["width"]
        self.matrix = nn.Parameter(torch.randn(rows, width))
        self.ssam = SSAM(width)

    def forward(self) -> Tensor:
        rows = self.ssam(self.matrix)
        groups = rows.view(self.settings["tokens"], -1, rows.shape[1])
        return (groups.mean(1) * self.settings["scale"])[None, None]


class ReleasedPrompt(Prompt):
    """The authors' released form: a single vector, plain cross-attention of it to itself in SSAM's place.

    Of one vector attention is no choice: it is two linear maps. (The released code has one checkpoint an artist; here
    the bank holds it as any other.)
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        width = settings["width"]
        self.matrix = nn.Parameter(torch.randn(1, 1, width))
        heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.attention = Attention(query_dim=width, heads=heads, dim_head=width // heads)

    def forward(self) -> Tensor:
        vector: Tensor = self.attention(self.matrix, encoder_hidden_states=self.matrix)
        return (vector * self.settings["scale"])[None]


def new_prompt(
    *,
    form: str,
    template: str,
    width: int,
    tokens: int = 1,
    rows: int = 16,
    scale: float = 1.0,
    base: str = "",
) -> Prompt:
    """An artist's prompt, untrained, drawn from torch's random state.

    Args:
        form: ``ssam``, the paper's, or ``released``.
        width: of the text model.
        tokens: placeholders that it fills; ``released`` fills one.
        rows: of ``ssam``'s matrix.
        scale: deviation of the text model's own token embeddings.

    Raises:
        ValueError: an unknown form, or numbers that do not go together.
    """
    if form not in FORMS:
        raise ValueError(f"prompt.form: {form!r} is none of {', '.join(FORMS)}")
    settings = {"method": "artbank", "form": form, "template": template, "width": width, "tokens": tokens}
    settings |= {"rows": rows if form == "ssam" else 1, "scale": scale, "base": base}
    if form == "released":
        if tokens != 1:
            raise ValueError(f"prompt.tokens: the released form has a single vector, not {tokens}; set it to 1")
        return ReleasedPrompt(settings)
    if not 1 <= tokens <= rows or rows % tokens:
        raise ValueError(f"prompt.rows: {rows} rows cannot be pooled to {tokens} tokens; take a multiple")
    return SSAMPrompt(settings)
