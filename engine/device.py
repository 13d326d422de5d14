"""The device a config names."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` names; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device: {name!r} is none of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"train.device: {name!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device: {name} asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device: {name} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    return device
