"""The network as a chain: frozen VGG, transfer, four decoder stages; and how auxiliary networks end in an image."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from tasks.style_transfer.scin.attention import CrossAttention
from tasks.style_transfer.scin.config import ModelConfig
from tasks.style_transfer.scin.encoder import NAMES, PerceptionEncoder, vgg_style
from tasks.style_transfer.scin.instance import instance_statistics
from tasks.style_transfer.scin.scin import SCIN, AdaIN, Unchanged
from tasks.style_transfer.vgg import VGG

STRIDE = 8
"""How many times smaller VGG's relu4_1 is than the picture."""
MULTIPLE = 16
"""The sides of pictures must be multiples of this."""
SIDES = (16, 32, 64, 128)
"""Side in pixels to which the painting is scaled for each stage's SCIN."""
LEVELS = ("relu4_1", "relu3_1", "relu2_1", "relu1_1")
"""VGG's layers that have the channels of each stage's input and the resolution of its convolutions."""
CHANNELS = (512, 256, 128, 64)
EXAMPLE_SIDE = 64


class Stage(nn.Module):
    """A decoder stage: normalise in the painting's style, double the resolution (except in the first), convolve.

    The convolutions are those of AdaIN's decoder, a mirrored VGG. Four stages with SCIN at 16, 32, 64 and 128 px are
    from the paper. (Our choice is that the last stage works at the output's 256 px and no stage at 16 px, that is 1/16,
    since relu4_1 is at 1/8.)

    Args:
        number: the stage, from 0 to 3.
        config: which normalisation to use, and the size of SCIN.
        width: factor on the number of channels, below 1 in auxiliary networks.

    Raises:
        ValueError: AdaIN with another number of channels than VGG, whose statistics it uses.
    """

    def __init__(self, number: int, config: ModelConfig, width: float = 1.0) -> None:
        super().__init__()
        self.number, self.config = number, config
        if width != 1 and config.normalisation == "adain":
            raise ValueError("VGG's statistics have the backbone's channels")
        before, after = (max(1, round(width * each)) for each in (CHANNELS[number], (*CHANNELS[1:], 64)[number]))
        self.normalise: nn.Module = Unchanged()
        if config.normalisation == "scin":
            self.normalise = SCIN(before, SIDES[number], config.scin_width, config.scin_depth)
        elif config.normalisation == "adain":
            self.normalise = AdaIN(number)
        between = [before] if number in (1, 2) else []
        channels = [before, *between, after]
        convolutions = [
            nn.Conv2d(wide, narrow, 3, 1, 1, padding_mode="reflect") for wide, narrow in itertools.pairwise(channels)
        ]
        for convolution in convolutions:
            assert convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        self.convolutions = nn.ModuleList(convolutions)

    def thinned(self, width: float) -> Stage:
        """A new stage of the same kind with ``width`` times the channels."""
        return Stage(self.number, self.config, width)

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        # Repeating pixels changes neither statistics nor ReLU, so both are computed on the small maps.
        x = F.relu(self.normalise(x, features))
        if self.number:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        first, *others = self.convolutions
        x = first(x)
        for convolution in others:
            x = convolution(F.relu(x))
        return F.relu_(x) if self.number == 3 else x


def _to_colours(channels: int, colours: int) -> nn.Conv2d:
    """A convolution whose output starts near middle grey, so that an untrained network already paints something."""
    convolution = nn.Conv2d(channels, colours, 3, 1, 1, padding_mode="reflect")
    assert convolution.bias is not None
    nn.init.xavier_normal_(convolution.weight, 0.1)
    nn.init.constant_(convolution.bias, 0.5)
    return convolution


class ToImage(nn.Module):
    """The last convolution, which makes an image with values from 0 to 1 or slightly beyond."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = _to_colours(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.convolution(x).float()
        return image


class AdaINTransfer(nn.Module):
    """AdaIN on VGG's relu4_1 instead of attention; nothing is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.adain = AdaIN(0)

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        result: Tensor = self.adain(x, features)
        return result


class Network(nn.Module):
    """Repaints a photograph in the style of a painting.

    It follows arXiv 2404.13584, whose authors have released no code: a frozen VGG for the content, the Perception
    Encoder for the style, cross-attention, and a decoder of four SCIN stages. The docstrings of the parts say which
    details are our choice.

    Args:
        load: whether to load VGG's weights; if not, others are about to be loaded.

    Raises:
        ValueError: VGG's weights are not available.
    """

    def __init__(self, config: ModelConfig, load: bool = True) -> None:
        super().__init__()
        self.config, self.loaded = config, load
        self.vgg = VGG(config.vgg, LEVELS, saved=True, load=load)
        self.pe = PerceptionEncoder() if config.style_encoder == "pe" else None
        self.transfer = CrossAttention(CHANNELS[0]) if config.transfer == "attention" else AdaINTransfer()
        self.stages = nn.ModuleList(Stage(number, config) for number in range(4))
        self.output = ToImage(64)


class Encoder(nn.Module):
    """The frozen VGG, applied to the content, and to the painting if anything reads VGG's features of it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        config = network.config
        self.vgg = network.vgg
        self.wants_style = config.style_encoder == "vgg" and config.reads_style_features
        self.wants_statistics = "adain" in (config.normalisation, config.transfer)

    @torch.no_grad()
    def forward(self, message: Message) -> Message:
        features = dict(message.features)
        features["x"] = features["content"] = self.vgg(message.x)[LEVELS[0]]
        if self.wants_style or self.wants_statistics:
            style = self.vgg(features["style"])
            if self.wants_style:
                features.update(vgg_style(style))
            if self.wants_statistics:
                features["style_statistics"] = [instance_statistics(style[name]) for name in LEVELS]
        return replace(message, features=features)


def network_chain(network: Network) -> Chain:
    """The chain: ``encode`` (frozen), ``transfer``, ``stage0`` to ``stage3``; all units after ``encode`` share ``pe``.

    Besides ``x``, messages carry the painting ``style``, its features (``style_near``, ``style_far``, ``style_code``)
    and ``content``, the photograph's relu4_1, which auxiliary networks add at their ends (GLCAN's global part).

    Example:
        >>> from tasks.style_transfer.vgg import VGGConfig
        >>> network = Network(ModelConfig(vgg=VGGConfig(weights="random")))
        >>> [unit.name for unit in network_chain(network).units]
        ['encode', 'transfer', 'stage0', 'stage1', 'stage2', 'stage3']
    """
    # The features of a shared encoder stay in the message to the end, since every block contributes to their gradient.
    transfer = _transfer if network.pe is None else _with_features
    units = [Unit("encode", Encoder(network), _encode), Unit("transfer", network.transfer, transfer)]
    units += [Unit(f"stage{n}", stage, _with_features, f"stage{n}") for n, stage in enumerate(network.stages)]
    side = EXAMPLE_SIDE
    example = Message({"x": torch.zeros(2, 3, side, side), "style": torch.zeros(2, 3, side, side)})
    shared = None if network.pe is None else Unit("pe", network.pe, _perceive)
    return Chain(
        network, units, Unit("output", network.output), example, shared=shared, shared_names=NAMES if shared else ()
    )


def _perceive(pe: nn.Module, message: Message) -> Message:
    return replace(message, features={**message.features, **pe(message.features["style"])})


def _encode(encoder: nn.Module, message: Message) -> Message:
    result: Message = encoder(message)
    return result


def _with_features(module: nn.Module, message: Message) -> Message:
    return message.with_x(module(message.x, message.features))


def _transfer(module: nn.Module, message: Message) -> Message:
    """The last unit that reads the painting's maps, which are dropped from the message here."""
    features = {name: value for name, value in message.features.items() if name not in ("style_near", "style_far")}
    return replace(message, features={**features, "x": module(message.x, message.features)})


class LightDecoderEnd(nn.Module):
    """The end of an auxiliary network: it adds the content features and makes an image.

    GLCAN's global part is the message's ``content``, added by a 1x1 convolution at the resolution of the features.
    Features far below the picture's resolution, as in auxiliary networks without a local part, are enlarged by a pixel
    shuffle.

    Args:
        channels: channels of the features.
        content: channels of the content features; 0 if there are none.
        larger: how many times larger the image is than the features.
    """

    def __init__(self, channels: int, content: int, larger: int) -> None:
        super().__init__()
        self.content = nn.Conv2d(content, channels, 1, bias=False) if content else None
        if self.content is not None:
            nn.init.kaiming_normal_(self.content.weight)
        self.larger = larger
        self.image = _to_colours(channels, 3 * larger**2)

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        x = message.x
        if self.content is not None:
            content = message.features["content"]
            normal = F.instance_norm(content) if min(content.shape[2:]) > 1 else content
            x = x + F.interpolate(self.content(normal), x.shape[2:], mode="nearest")
        return F.pixel_shuffle(self.image(F.relu(x)), self.larger).float()


def light_end(chain: Chain, features: Message) -> LightDecoderEnd:
    """The end for features like ``features``, which were made from the chain's example.

    Its image has at least a quarter of the picture's resolution, since VGG sees nothing in smaller images.
    """
    side, at = chain.example.x.shape[-1], features.x.shape[-1]
    larger = 1
    while at * larger < side // 4:
        larger *= 2
    content = features.features.get("content")
    return LightDecoderEnd(features.x.shape[1], 0 if content is None else content.shape[1], larger)
