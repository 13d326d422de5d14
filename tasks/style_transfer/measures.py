"""Networks that judge pictures: LPIPS and FID, where their weights can be had."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image import FrechetInceptionDistance, LearnedPerceptualImagePatchSimilarity


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures from 0 to 1 with 8 bits, as if read from files."""
    return (pictures * 255).round().to(torch.uint8)


def load_lpips(network: str, key: str = "data.lpips") -> LearnedPerceptualImagePatchSimilarity:
    """LPIPS (Zhang et al. 2018) of pairs from 0 to 1, one number each.

    Raises:
        ValueError: its weights cannot be loaded; names ``key``.
    """
    try:
        return LearnedPerceptualImagePatchSimilarity(network, reduction="none", normalize=True)  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(
            f"{key}: {network} and its weights, which torchvision downloads into {torch.hub.get_dir()}, cannot be "
            f"loaded: {first_sentence(error)}"
        ) from error


def load_fid(weights: Path, paintings: int, key: str = "data.fid_weights") -> FrechetInceptionDistance:
    """FID (Heusel et al. 2017) to so many paintings.

    Raises:
        ValueError: there are too few paintings, or the weights cannot be loaded; names ``key``.
    """
    if paintings < 2:
        raise ValueError(f"{key}: FID needs 2 test paintings at least, there is {paintings}; see data.tests")
    if not weights.is_file():
        raise ValueError(f"{key}: there is no file {weights}")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        # One rank evaluates; the others would not answer.
        return FrechetInceptionDistance(feature_extractor_weights_path=str(weights), sync_on_compute=False)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: FID needs torch-fidelity; pip install torch-fidelity") from error
    except Exception as error:
        raise ValueError(
            f"{key}: {weights} does not hold the weights of torch-fidelity's Inception, as "
            f"weights-inception-2015-12-05-6726825d.pth of its releases does: {first_sentence(error)}"
        ) from error


def first_sentence(error: BaseException) -> str:
    """Its first sentence; PyTorch goes on for long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".split(". ")[0][:200]
