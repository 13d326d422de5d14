"""Small networks and images that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from engine.config import parse
from engine.utilities.seed import seeded
from tasks.super_resolution.config import ModelConfig, SuperResolutionConfig
from tasks.super_resolution.network import build_network
from tasks.super_resolution.task import SuperResolution

SMALL: dict[str, dict[str, Any]] = {
    "EDSR": {"num_feat": 8, "num_block": 4},
    "MSRResNet": {"num_feat": 8, "num_block": 4},
    "RCAN": {"num_feat": 8, "num_group": 2, "num_block": 2, "squeeze_factor": 2},
    "RRDBNet": {"num_feat": 8, "num_block": 3, "num_grow_ch": 4},
    "SwinIR": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "img_size": 16, "mlp_ratio": 2},
}
EVERY_KIND = [(kind, scale) for kind in SMALL for scale in (2, 4)]
"""And the scales that all of them have."""


def small_network(kind: str, scale: int = 2, **options: Any) -> nn.Module:
    with seeded(0, kind):
        return build_network(ModelConfig(kind, scale, {**SMALL[kind], **options}))  # type: ignore[arg-type]


def image(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def write_images(folder: Path, sides: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """Smooth noise, height x width by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name, (height, width) in sides.items():
        coarse = random.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return folder


def small_task(*overrides: str) -> tuple[SuperResolutionConfig, SuperResolution]:
    """The smoke config's tiny EDSR."""
    config = parse(SuperResolutionConfig, ["--config", "tasks/super_resolution/configs/smoke.yaml", *overrides])
    return config, SuperResolution(config)
