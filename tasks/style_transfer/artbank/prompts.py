"""The prompts of the Implicit Style Prompt Bank: one matrix per artist, and attention that turns it into a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from engine.utilities.text import none_of
from tasks.style_transfer.diffusion.bank import Prompt

TEMPLATE = "a painting by {artist} *"
"""The coarse prompt; what training learns replaces the embedding of ``*``."""
FORMS = ("ssam", "released")


class SSAM(nn.Module):
    """The Spatial-Statistical self-Attention Module: attention that yields a mean and a deviation (arXiv 2312.06135).

    The paper gives its name and where it stands. The arithmetic is our choice, guided by that name and by the attention
    statistics of AdaAttN (Liu et al. 2021)::

        A = softmax(Q K^T / sqrt(d)),  M = A V,  S = sqrt(relu(A (V * V) - M * M)),  output = S * Norm(I) + M

    Maps (n, d) to (n, d).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, matrix: Tensor) -> Tensor:
        query, key, value = self.query(matrix), self.key(matrix), self.value(matrix)
        attention = (query @ key.T / math.sqrt(matrix.shape[1])).softmax(1)
        mean: Tensor = attention @ value
        variance = attention @ (value * value) - mean * mean
        # Where one row takes all the attention the variance is 0, and the square root has no finite slope at 0.
        return (F.relu(variance) + 1e-6).sqrt() * F.layer_norm(matrix, matrix.shape[1:]) + mean


class SSAMPrompt(Prompt):
    """A matrix (rows, width) that passes through SSAM and is pooled to one vector per placeholder of the template."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        rows, width = settings["rows"], settings["width"]
        self.matrix = nn.Parameter(torch.randn(rows, width))
        self.ssam = SSAM(width)

    def forward(self) -> Tensor:
        rows: Tensor = self.ssam(self.matrix)
        groups = rows.view(self.settings["tokens"], -1, rows.shape[1])
        scale: float = self.settings["scale"]
        return (groups.mean(1) * scale)[None, None]


class ReleasedPrompt(Prompt):
    """The form of the released code: a single vector, with plain attention to itself in place of SSAM.

    A single vector leaves attention nothing to choose between, so it amounts to two linear maps. (The released code
    keeps one checkpoint per artist; here the bank holds this prompt like any other.)
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        width = settings["width"]
        self.matrix = nn.Parameter(torch.randn(1, 1, width))
        heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.attention = Attention(query_dim=width, heads=heads, dim_head=width // heads)

    def forward(self) -> Tensor:
        vector: Tensor = self.attention(self.matrix, encoder_hidden_states=self.matrix)
        scale: float = self.settings["scale"]
        return (vector * scale)[None]


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
    """An untrained prompt for one artist, drawn from torch's random state.

    Args:
        form: ``ssam``, as in the paper, or ``released``.
        width: width of the text model.
        tokens: number of placeholders that the prompt fills; ``released`` fills one.
        rows: rows of the matrix of ``ssam``.
        scale: standard deviation of the text model's own token embeddings.

    Raises:
        ValueError: the form is unknown, or the numbers do not fit together.
    """
    if form not in FORMS:
        raise ValueError(f"prompt.form: {none_of(form, FORMS)}")
    settings = {"method": "artbank", "form": form, "template": template, "width": width, "tokens": tokens}
    settings |= {"rows": rows if form == "ssam" else 1, "scale": scale, "base": base}
    if form == "released":
        if tokens != 1:
            raise ValueError(f"prompt.tokens: the released form has a single vector, not {tokens}; set it to 1")
        return ReleasedPrompt(settings)
    if not 1 <= tokens <= rows or rows % tokens:
        raise ValueError(f"prompt.rows: {rows} rows cannot be pooled to {tokens} tokens; take a multiple")
    return SSAMPrompt(settings)
