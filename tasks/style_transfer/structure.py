"""How much of a photograph's structure a picture keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from tasks.style_transfer.colour import LUMINANCE


def edges(pictures: Tensor) -> Tensor:
    """Slope (N, 1, H, W) of the luminance of ``pictures`` (N, 3, H, W), by Sobel filters; 0 where the picture is flat.

    Example:
        >>> edges(torch.full((1, 3, 4, 4), 0.3)).max().item() < 1e-5
        True
    """
    light = (pictures * pictures.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    across = light.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([across, across.T])[:, None]
    slopes = F.conv2d(F.pad(light, (1, 1, 1, 1), "replicate"), kernels)
    return slopes.square().sum(1, keepdim=True).sqrt()


def edge_ssim(pictures: Tensor, contents: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004), (N), of the edges of ``pictures`` and ``contents`` (N, 3, H, W); 1 for equal edges."""
    found = structural_similarity_index_measure(edges(pictures), edges(contents), data_range=1.0, reduction="none")
    return torch.as_tensor(found).reshape(-1)
