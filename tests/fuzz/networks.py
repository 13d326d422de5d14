"""Small networks of units with the traits, and mistakes, that users' own networks have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.chain import Chain, Unit
from engine.network.message import Message

WIDTH = 6


class Plain(nn.Module):
    """A convolution and a leaky ReLU, whose output the next unit may change in place.

    The classes below differ from it by what their docstrings say.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, WIDTH, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.conv(x))


class Normed(Plain):
    """BatchNorm."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.norm(self.conv(x)))


class InPlace(Plain):
    """It changes its input."""

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.conv(x.mul_(2)))


class Dropped(Plain):
    """Random numbers."""

    def forward(self, x: Tensor) -> Any:
        return F.dropout(super().forward(x), 0.3, self.training)


class LayerDrop(Plain):
    """Random numbers decide which parameters are used."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.extra = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x if self.training and torch.rand(()) < 0.5 else x + self.extra(x)


class Unused(Plain):
    """A parameter that forward does not use."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.spare = nn.Parameter(torch.ones(3))


class Frozen(Plain):
    """No parameter that is trained."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.requires_grad_(False)


class Spectral(Plain):
    """Buffers that every forward pass changes."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        nn.utils.parametrizations.spectral_norm(self.conv)


class Counting(Plain):
    """A buffer that counts forward passes in training, and scales by it."""

    persistent = True

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.register_buffer("passes", torch.zeros(()), persistent=self.persistent)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.passes += 1
        return super().forward(x) / (1 + self.passes)


class CountingAside(Counting):
    """The same in a buffer that no checkpoint has."""

    persistent = False


class Remembering(Plain):
    """A counter that is no buffer."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.passes = 0

    def forward(self, x: Tensor) -> Any:
        self.passes += self.training
        return super().forward(x) / (1 + self.passes)

    def get_extra_state(self) -> Any:
        return {"passes": self.passes}

    def set_extra_state(self, state: Any) -> None:
        self.passes = state["passes"]


class Masked(Plain):
    """An infinite constant."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


class Tied(Plain):
    """One module under two names."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.again = self.conv


class Tuple(Plain):
    """It returns more than a tensor."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Nothing(Plain):
    """It returns nothing."""

    def forward(self, x: Tensor) -> Any:
        super().forward(x)


class Raising(Plain):
    """Its forward pass fails."""

    def forward(self, x: Tensor) -> Any:
        raise KeyError("size")


class Wide(Plain):
    """The next unit expects another number of channels."""

    def forward(self, x: Tensor) -> Any:
        return torch.cat([super().forward(x), x[:, :1]], 1)


class Lazy(Plain):
    """Its parameters have no shape yet."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.conv = nn.LazyConv2d(WIDTH, 1)


class Detached(Plain):
    """No gradient passes."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach()


class Halving(Plain):
    """Smaller maps; four of them leave a single pixel."""

    def forward(self, x: Tensor) -> Any:
        return F.max_pool2d(super().forward(x), 2)


class Tokens(Plain):
    """A sequence instead of a map."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).flatten(2).transpose(1, 2)


class Shared(Plain):
    """A submodule that is the neighbour's too; ``chain`` ties them."""


TRAITS: list[type[Plain]] = [
    *(Plain, Normed, InPlace, Dropped, LayerDrop, Unused, Frozen, Spectral, Counting, CountingAside, Remembering),
    *(Masked, Tied, Tuple, Nothing, Raising, Wide, Lazy, Detached, Halving, Tokens, Shared),
]
DRAWN: list[type[Plain]] = [Plain, Plain]
"""The units of the next network; a test puts them here."""
CHAIN: list[str] = []
"""Mistakes in how the next chain is put together."""


def pooled(module: nn.Module, message: Message) -> Message:
    return message.with_x(module(message.x.mean((2, 3))))


def skipping(module: nn.Module, message: Message) -> Message:
    """A unit that also reads a feature that only some messages have."""
    return message.with_x(module(message.x + message.features.get("skip", torch.zeros(()))))


def sending(module: nn.Module, message: Message) -> Message:
    return replace(message, features={"x": module(message.x), "skip": torch.ones(len(message.x), 1, 1, 1)})


FORWARDS: dict[str, Callable[[nn.Module, Message], Any]] = {
    "skip": skipping,
    "send": sending,
    "tensor": lambda module, message: module(message.x),
    "none": lambda module, message: None,
}


def chain(classes: int, size: int) -> Chain:
    layers = [make(WIDTH if number else 3) for number, make in enumerate(DRAWN)]
    for before, layer in pairwise(layers):
        if isinstance(layer, Shared):
            layer.conv = before.conv
    width = WIDTH + ("head" in CHAIN)
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    units = [Unit(f"layer{number}", layer, stage=f"stage{number // 2}") for number, layer in enumerate(layers)]
    for name in FORWARDS.keys() & set(CHAIN):
        units[-1] = replace(units[-1], forward=FORWARDS[name])
    if "order" in CHAIN:
        units.reverse()
    if "missing" in CHAIN:
        units.pop()
    if "twice" in CHAIN:
        units.append(units[0])
    if "name" in CHAIN:
        units = [replace(unit, name="layer") for unit in units]
    example = Message({"y" if "input" in CHAIN else "x": torch.zeros(1 if "one" in CHAIN else 2, 3, size, size)})
    return Chain(model, units, Unit("head", model[-1], pooled), example)


MISTAKES = ["head", "skip", "send", "tensor", "none", "order", "missing", "twice", "name", "input", "one"]
