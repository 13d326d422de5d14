"""The image encoder of a CLIP model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.weights import why_unreadable


class CLIPFeatures(nn.Module):
    """The frozen image encoder of a CLIP model in transformers' layout; gradients pass through it to the pictures.

    Args:
        name: a folder, or the model's name on the hub.
        key: config key that gives the name, for the error.

    Raises:
        ValueError: no CLIP model can be loaded from there.
    """

    def __init__(self, name: str, key: str = "loss.clip") -> None:
        super().__init__()
        try:
            from transformers import CLIPVisionModelWithProjection

            model = CLIPVisionModelWithProjection.from_pretrained(name)
        except Exception as error:
            raise ValueError(f"{key}: no CLIP model can be loaded from {name!r}: {why_unreadable(error)}") from error
        self.side, self.width = int(model.config.image_size), int(model.config.projection_dim)
        self.model = _frozen(model)
        mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.deviation: Tensor
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor, deep: Tensor | None = None) -> Tensor:
        """Embeddings (N, width) of pictures (N, 3, H, W) from 0 to 1."""
        small = F.interpolate(pictures, (self.side, self.side), mode="bicubic", antialias=True)
        embedding: Tensor = self.model(pixel_values=(small - self.mean) / self.deviation).image_embeds
        return embedding


def _frozen(model: nn.Module) -> nn.Module:
    """``model`` with buffers that are not saved instead of parameters: no optimizer and no checkpoint holds them."""
    for module in model.eval().modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
    return model
