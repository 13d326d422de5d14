"""Networks that judge pictures, LPIPS and FID, if their weights are available."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image import FrechetInceptionDistance, LearnedPerceptualImagePatchSimilarity

from tasks.weights import why_unreadable


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures from 0 to 1 as 8-bit values, as if read from files."""
    return (pictures * 255).round().to(torch.uint8)


def load_lpips(network: str, key: str = "data.lpips") -> LearnedPerceptualImagePatchSimilarity:
    """LPIPS (Zhang et al. 2018) of pairs of pictures from 0 to 1, one number per pair.

    Raises:
        ValueError: its weights cannot be loaded; the message names ``key``.
    """
    try:
        return LearnedPerceptualImagePatchSimilarity(network, reduction="none", normalize=True)  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(
            f"{key}: {network} and its weights, which torchvision downloads into {torch.hub.get_dir()}, cannot be "
            f"loaded: {first_sentence(error)}"
        ) from error


def load_fid(weights: Path, paintings: int, key: str = "data.fid_weights") -> FrechetInceptionDistance:
    """FID (Heusel et al. 2017) to a set of ``paintings`` paintings.

    Raises:
        ValueError: there are too few paintings, or the weights cannot be loaded; the message names ``key``.
    """
    if paintings < 2:
        raise ValueError(f"{key}: FID needs at least 2 test paintings, and there is {paintings}; see data.tests")
    if not weights.is_file():
        raise ValueError(f"{key}: there is no file {weights}")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        # Only one rank evaluates, so the others would never answer a request to synchronise.
        return FrechetInceptionDistance(feature_extractor_weights_path=str(weights), sync_on_compute=False)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: FID needs torch-fidelity; pip install torch-fidelity") from error
    except Exception as error:
        raise ValueError(
            f"{key}: {weights} does not hold the weights of torch-fidelity's Inception, as "
            f"weights-inception-2015-12-05-6726825d.pth of its releases does: {first_sentence(error)}"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error, cut to one line; PyTorch's messages go on for paragraphs."""
    return f"{type(error).__name__}: {why_unreadable(error)}".split(". ")[0]
