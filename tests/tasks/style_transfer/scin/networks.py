"""Small configs of the network, with an untrained VGG, for tests."""

from __future__ import annotations

from typing import Any

from tasks.style_transfer.scin.config import LossConfig, ModelConfig, SCINConfig
from tasks.style_transfer.vgg import VGGConfig
from tests.shared import SHARED

VGG16 = VGGConfig("vgg16", "random")
REAL_VGG16 = VGGConfig("vgg16", str(SHARED / "weights/vgg16_relu4_1_fp16.safetensors"), "bytes")
SMOKE = "tasks/style_transfer/scin/configs/smoke.yaml"


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"vgg": VGG16, "scin_width": 16, "scin_depth": 1, **changes})


def loss(**changes: Any) -> LossConfig:
    layers = [f"relu{stage}_1" for stage in range(1, 5)]
    return LossConfig(**{"style_layers": layers, "content_layers": layers[-1:], **changes})


def scin(**changes: Any) -> SCINConfig:
    """A config with dotted changes, as ``scin(local__blocks=2)``."""
    made = SCINConfig(task="style_transfer/scin", model=model(), loss=loss())
    made.optimizer.name, made.optimizer.lr, made.optimizer.weight_decay = "adamw", 1e-3, 0.0
    made.data.crop = made.data.resize = 32
    made.data.batch = 2
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made
