"""From artist and time to what the denoiser's cross-attention reads: learnt vectors through the frozen text model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tasks.style_transfer.diffusion.bank import Prompt
from tasks.style_transfer.diffusion.text import encode, placeholders, template_text, tokens


class Conditioner(nn.Module):
    """Prompts of some artists, encoded.

    Rows 0, 1, ... are the artists, in the order given; then comes one without any prompt, the empty text that guidance
    goes away from. Which row each sample has is a tensor, so that shapes hang on nothing but shapes.

    Args:
        prompts: by artist; of one form.
        times: that the noise's course has.
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
        self.register_buffer("ids", torch.cat([*ids, nothing]), persistent=False)
        self.register_buffer("mask", torch.cat([*masks, torch.zeros_like(nothing, dtype=torch.bool)]), persistent=False)

    @property
    def nothing(self) -> int:
        """The row without a prompt."""
        return len(self.prompts)

    def forward(self, rows: Tensor, t: Tensor, present: Collection[int]) -> Tensor:
        """(N, layers * length, width) of rows (N) and times (N); each layer's part in turn.

        Where there are several layers, each of the denoiser's takes its part (see ``lsast.routing``).

        Args:
            present: which rows there are among ``rows``: the others' prompts are not made, so that an optimizer leaves
                them as they are, whoever else learns.
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
        ValueError: it is too long for the text model.
    """
    count = prompt.settings["tokens"]
    ids = tokens(tokenizer, [template_text(prompt.settings["template"], artist, count)])
    return ids, placeholders(tokenizer, ids, count)


def encode_layers(encoder: CLIPTextModel, ids: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
    """What each layer of the denoiser reads of each text, one after another: (N, layers * length, width).

    Args:
        ids: tokens (N, length).
        mask: which of them are placeholders (N, length).
        vectors: in their stead, (N, layers, placeholders, width).
    """
    layers = vectors.shape[1]
    ids, mask = (table.repeat_interleave(layers, 0) for table in (ids, mask))
    encoded = encode(encoder, ids, mask, vectors.flatten(0, 1))
    return encoded.view(len(vectors), layers * encoded.shape[1], encoded.shape[2])
