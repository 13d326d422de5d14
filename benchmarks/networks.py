"""Two networks for benchmarks that our frameworks lack in this form: one is wide, one has many parameters.

Chains for ``model.name``: ``benchmarks.networks:wrn28_10``, ``benchmarks.networks:vgg16``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.chain import Chain, Unit
from engine.network.message import Message


class WideBlock(nn.Module):
    """A pre-activation block of two 3x3 convolutions and a shortcut (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        normal = F.relu(self.bn1(x))
        passed = x if self.shortcut is None else self.shortcut(normal)
        out: Tensor = passed + self.conv2(F.relu(self.bn2(self.conv1(normal))))
        return out


def wrn28_10(classes: int, size: int) -> Chain:
    """WRN-28-10: 36.5 million parameters; three stages of four blocks with 160, 320 and 640 channels."""
    layers: list[tuple[str, str, nn.Module]] = [("stem", "stem", nn.Conv2d(3, 16, 3, 1, 1, bias=False))]
    inputs = 16
    for stage, outputs in enumerate((160, 320, 640)):
        for number in range(4):
            block = WideBlock(inputs, outputs, 2 if stage and not number else 1)
            layers.append((f"stage{stage}_{number}", f"stage{stage}", block))
            inputs = outputs
    # The last block's output is normalised before it is pooled.
    head = nn.Sequential(nn.BatchNorm2d(640), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, classes))
    return _chain(layers, head, size)


def vgg16(classes: int, size: int) -> Chain:
    """VGG-16 with BatchNorm (configuration D of Simonyan and Zisserman, 2014): 138 million parameters at 224 px
    and 1000 classes, 34 million at 32 px and 10.

    Each layer of 4096 features returns them as a map of one position. The first of them pools maps of any size to the
    size that it needs, since auxiliary networks work at half the resolution.

    Raises:
        ValueError: ``size`` is not a multiple of 32.
    """
    if size % 32:
        raise ValueError(f"data.size: {size} px; VGG-16 halves five times, so take a multiple of 32")
    layers: list[tuple[str, str, nn.Module]] = []
    inputs = 3
    for stage, (outputs, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for number in range(count):
            parts = [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
            pool = [nn.MaxPool2d(2)] if number == count - 1 else []
            layers.append((f"conv{stage}_{number}", f"conv{stage}", nn.Sequential(*parts, *pool)))
            inputs = outputs
    for number, side in enumerate((size // 32, 1)):
        first = [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(inputs * side**2, 4096)]
        dense = nn.Sequential(*first, nn.Unflatten(1, (4096, 1, 1)), nn.ReLU(), nn.Dropout(0.5))
        layers.append((f"dense{number}", "dense", dense))
        inputs = 4096
    return _chain(layers, nn.Sequential(nn.Flatten(), nn.Linear(4096, classes)), size)


def _chain(layers: list[tuple[str, str, nn.Module]], head: nn.Module, size: int) -> Chain:
    """A chain of layers (name, stage, module) and a head; the model uses the same names."""
    model = nn.Sequential()
    for name, _, module in layers:
        model.add_module(name, module)
    model.add_module("head", head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    units = [Unit(name, module, stage=stage) for name, stage, module in layers]
    return Chain(model, units, Unit("head", head), Message({"x": torch.zeros(2, 3, size, size)}))
