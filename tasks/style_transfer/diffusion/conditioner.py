"""Encode artists' prompts for the denoiser's cross-attention: learnt vectors pass through the frozen text model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tasks.style_transfer.diffusion.bank import Prompt
from tasks.style_transfer.diffusion.text import encode, placeholders, template_text, tokens


class Conditioner(nn.Module):
    """Encodes the prompts of some artists.

    Rows 0, 1, ... are the artists, in the order given. The last row is without a prompt: the empty text, from which
    guidance moves away. The row of each sample is a tensor, so that no shape depends on a value.

    Args:
        prompts: prompts by artist, all of one form.
        times: number of timesteps.
    """

    def __init__(
        self, prompts: Mapping[str, Prompt], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, times: int
    ) -> None:
        super().__init__()
        assert prompts, "at least one artist"
        self.times, self.text_encoder = times, text_encoder
        self.prompts = nn.ModuleDict({f"artist_{artist}": prompt for artist, prompt in prompts.items()})
        ids, masks = zip(*(prompt_tokens(tokenizer, artist, prompt) for artist, prompt in prompts.items()), strict=True)
        nothing = tokens(tokenizer, [""])
        self.ids: Tensor
        self.register_buffer("ids", torch.cat([*ids, nothing]), persistent=False)
        self.mask: Tensor
        self.register_buffer("mask", torch.cat([*masks, torch.zeros_like(nothing, dtype=torch.bool)]), persistent=False)

    @property
    def nothing(self) -> int:
        """The row without a prompt."""
        return len(self.prompts)

    def forward(self, rows: Tensor, t: Tensor, present: Collection[int]) -> Tensor:
        """Encoded prompts (N, layers * length, width) for rows (N) at timesteps ``t`` (N), one layer's part after
        another.

        If there are several parts, each cross-attention layer of the denoiser reads its own (see ``lsast.routing``).

        Args:
            present: the rows that occur in ``rows``. Prompts of other rows are not computed, so they get no gradient
                and the optimizer leaves them as they are.
        """
        made = {row: prompt() for row, prompt in enumerate(self.prompts.values()) if row in present}
        nothing = torch.zeros_like(next(iter(made.values()))) if made else self._nothing()
        vectors = torch.stack([made.get(row, nothing) for row in range(len(self.prompts) + 1)])
        part = t * vectors.shape[1] // self.times  # (artists + 1, times, layers, tokens, width)
        return encode_layers(self.text_encoder, self.ids[rows], self.mask[rows], vectors[rows, part])

    def _nothing(self) -> Tensor:
        with torch.no_grad():
            return torch.zeros_like(next(iter(self.prompts.values()))())


def prompt_tokens(tokenizer: CLIPTokenizer, artist: str, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Tokens (1, length) of an artist's template, and which of them are placeholders.

    Raises:
        ValueError: the text is too long for the text model.
    """
    count = prompt.settings["tokens"]
    ids = tokens(tokenizer, [template_text(prompt.settings["template"], artist, count)])
    return ids, placeholders(tokenizer, ids, count)


def encode_layers(encoder: CLIPTextModel, ids: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
    """What the layers of the denoiser read for each text, one layer after another: (N, layers * length, width).

    Args:
        ids: tokens (N, length).
        mask: which tokens are placeholders (N, length).
        vectors: what replaces the placeholders (N, layers, placeholders, width).
    """
    layers = vectors.shape[1]
    ids, mask = (table.repeat_interleave(layers, 0) for table in (ids, mask))
    encoded = encode(encoder, ids, mask, vectors.flatten(0, 1))
    return encoded.view(len(vectors), layers * encoded.shape[1], encoded.shape[2])
