"""LSAST's Step-aware and Layer-aware Prompt Space: prompts by the stage of denoising and by the denoiser's layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.utilities.text import none_of
from tasks.style_transfer.diffusion.bank import Prompt

TEMPLATE = "*"
LAYERS = 3
"""Prompts per stage: for the innermost, middle and outermost layers, or for encoder, middle and decoder."""
FORMS = ("paper", "released")


class PromptSpace(Prompt):
    """A learnable matrix, three self-attention blocks, and ``stages`` groups of three prompts (arXiv 2404.11474).

    Each prompt is the embedding of a placeholder, which the frozen text model reads. This choice, the size of the
    attention blocks and that they follow one another are ours. ``released`` is the routing of the authors' code: stage
    s reads ``rows[s : s + 3]``, so that with 10 stages and 30 rows the last 18 rows are never read.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        stages, width = settings["stages"], settings["width"]
        self.matrix = nn.Parameter(torch.randn(stages * LAYERS, width))
        heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, norm_first=True, batch_first=True)
            for _ in range(3)
        )
        stage = torch.arange(stages)[:, None]
        step = LAYERS if settings["form"] == "paper" else 1
        self.rows: Tensor
        self.register_buffer("rows", stage * step + torch.arange(LAYERS), persistent=False)

    def all_rows(self) -> Tensor:
        """The output (3 * stages, width) of the attention blocks for the matrix."""
        x: Tensor = self.matrix[None]
        for block in self.blocks:
            x = block(x)
        scale: float = self.settings["scale"]
        return x[0] * scale

    def forward(self) -> Tensor:
        return self.all_rows()[self.rows][:, :, None]


def new_prompt(
    *,
    form: str,
    template: str,
    width: int,
    stages: int = 10,
    tokens: int = 1,
    scale: float = 1.0,
    base: str = "",
) -> Prompt:
    """An untrained prompt space for one artist, drawn from torch's random state.

    Args:
        form: ``paper``, or ``released`` for the routing of the released code.
        width: width of the text model.
        stages: number of equal parts that the timesteps are divided into.
        tokens: number of placeholders; must be 1.
        scale: standard deviation of the text model's own token embeddings.

    Raises:
        ValueError: the form is unknown, or a number is out of range.
    """
    if form not in FORMS:
        raise ValueError(f"prompt.form: {none_of(form, FORMS)}")
    if tokens != 1:
        raise ValueError(f"prompt.tokens: a prompt of LSAST is a single vector, not {tokens}; set it to 1")
    if stages < 1:
        raise ValueError(f"prompt.stages: {stages} is too small; the least is 1")
    settings = {"method": "lsast", "form": form, "template": template, "width": width, "tokens": tokens}
    return PromptSpace({**settings, "stages": stages, "scale": scale, "base": base})
