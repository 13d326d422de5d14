"""The CIFAR-style ResNets of He et al. (2016), section 4.2, with the usual parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.chain import Chain, Unit
from engine.network.message import Message


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample and pad with zeros).

    Widths are taken from the convolutions at run time, so that a thinned copy works without changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        missing = out.shape[1] - x.shape[1]
        if self.conv1.stride != (1, 1):
            x = x[:, :, ::2, ::2]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A ResNet of 6n+2 layers: a stem, three stages of n blocks with 16, 32 and 64 channels, pooling, one linear layer.

    Args:
        depth: 20, 32, 44, 56, 110, or any other 6n+2.
        classes: number of classes.

    Raises:
        ValueError: there is no such depth.

    Input (batch, 3, height, width), output (batch, classes).
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"model.name: resnet{depth} does not exist; CIFAR-style depths are 6n+2: 8, 14, 20, 32, 44, 56, 110"
            )
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, count, 1)
        self.layer2 = self._stage(16, 32, count, 2)
        self.layer3 = self._stage(32, 64, count, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
        blocks = [BasicBlock(in_channels, channels, stride)]
        blocks += [BasicBlock(channels, channels, 1) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet_chain(depth: int, classes: int, size: int) -> Chain:
    """A ResNet as a chain: the stem, each residual block, and the linear layer as head.

    Raises:
        ValueError: there is no such depth.
    """
    model = ResNet(depth, classes)
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU(inplace=True))
    units = [Unit("stem", stem, stage="stem")]
    for name in ("layer1", "layer2", "layer3"):
        stage = model.get_submodule(name)
        units += [Unit(f"{name}.{number}", block, stage=name) for number, block in stage.named_children()]
    head = Unit("linear", model.linear, lambda module, message: message.with_x(module(message.x.mean((2, 3)))))
    return Chain(model, units, head, Message({"x": torch.zeros(2, 3, size, size)}))
