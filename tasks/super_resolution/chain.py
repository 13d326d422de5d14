"""BasicSR's networks as chains: first convolution, residual blocks, last convolution; the tail is the head.

Between units, ``x`` is a map at the low resolution. Messages also carry ``image``, the input, and ``shallow``, the map
of the first convolution, as far as the unit that adds it. Only the tail works at the high resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from basicsr.archs.arch_util import pixel_unshuffle
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.swinir_arch import SwinIR
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.network.chain import Chain, Unit
from engine.network.message import Message
from tasks.super_resolution.network import side_multiple

EXAMPLE_SIDE = 48
"""Side in pixels of the image that shapes are inferred with, rounded up to the network's windows."""

Finish = Callable[[Tensor, Tensor], Tensor]
"""Maps features and the low-resolution image to the high-resolution image."""


def network_chain(network: nn.Module, tail_parts: int = 1) -> Chain:
    """The chain of one of BasicSR's EDSR, MSRResNet, RCAN, RRDBNet and SwinIR for three-channel images.

    Args:
        tail_parts: see ``Tail``.

    Raises:
        ValueError: it is another network, or one for other images.

    Example:
        >>> from basicsr.archs.edsr_arch import EDSR
        >>> [unit.name for unit in network_chain(EDSR(3, 3, num_feat=4, num_block=2, upscale=2)).units]
        ['stem', 'body.0', 'body.1', 'body.end']
    """
    builders: dict[type[nn.Module], Callable[[Any], tuple[list[Unit], nn.Module]]] = {
        EDSR: _edsr,
        RCAN: _rcan,
        MSRResNet: _msrresnet,
        RRDBNet: _rrdbnet,
        SwinIR: _swinir,
    }
    kind = type(network)
    if kind not in builders:
        known = ", ".join(known.__name__ for known in builders)
        raise ValueError(f"network {kind.__name__} is none of BasicSR's {known}")
    multiple = side_multiple(network)
    side = -(-EXAMPLE_SIDE // multiple) * multiple
    example = Message({"x": torch.zeros(2, 3, side, side)})
    units, tail = builders[kind](network)
    chain = Chain(network, units, Unit("tail", Tail(tail, tail_parts), _finish), example)
    try:
        chain.shapes()
    except ValueError as error:
        raise ValueError(f"{kind.__name__} does not take images (3, {side}, {side}): {error}") from error
    return chain


def enlargement(chain: Chain) -> int:
    """How many times larger the output of the chain's network is than its input."""
    return int(chain.prediction().shape[-1] // chain.example.x.shape[-1])


class Tail(nn.Module):
    """The end of a network, from features (N, C, H, W) to images (N, 3, scale H, scale W).

    At the high resolution every channel costs scale^2 times as much as in the body: two thirds of EDSR's peak at scale
    4 belong to its tail. So the tail can process the batch in ``parts``, one after another, and recompute their maps at
    the high resolution in backward instead of keeping them.

    Args:
        layers: called as ``layers(features, image)``.
    """

    def __init__(self, layers: nn.Module, parts: int) -> None:
        super().__init__()
        self.layers, self.parts = layers, parts

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        parts = min(self.parts, len(features))
        run: Finish = self.layers
        if parts == 1:
            return run(features, image)
        if torch.is_grad_enabled():
            run = partial(checkpoint, self.layers, use_reentrant=False, preserve_rng_state=False)  # it has no dropout
        pairs = zip(features.tensor_split(parts), image.tensor_split(parts), strict=True)
        return torch.cat([run(*pair) for pair in pairs])


def _finish(tail: nn.Module, message: Message) -> Message:
    return message.with_x(tail(message.x, message.features["image"]))


def _first(module: nn.Module, message: Message, *, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> Message:
    """Make the first map from the image, and keep it in the message."""
    shallow = module(prepare(message.x))
    return replace(message, features={"x": shallow, "shallow": shallow, "image": message.x})


def _last(module: nn.Module, message: Message) -> Message:
    """Apply the body's last convolution and add the first map, which is the global skip."""
    x = module(message.x) + message.features["shallow"]
    return replace(message, features={"x": x, "image": message.features["image"]})


class _Scaled(nn.Module):
    """Layers whose output is scaled and shifted back to the range and mean of images."""

    def __init__(self, network: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.colour = _Colour(network)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        return self.colour.back(self.layers(features))


class _Colour:
    """The shift and scale of images on the way into a network and back; the mean is not a buffer of the network."""

    def __init__(self, network: Any) -> None:
        self.mean: list[float] = network.mean.flatten().tolist()
        self.range: float = network.img_range

    def _like(self, image: Tensor) -> Tensor:
        # The values are filled in on the device: a copy from main memory would make the GPU wait.
        return torch.cat([image.new_full((1, 1, 1, 1), value) for value in self.mean], dim=1)

    def into(self, image: Tensor) -> Tensor:
        return (image - self._like(image)) * self.range

    def back(self, image: Tensor) -> Tensor:
        image = image.float()  # half precision is too coarse for images
        return image / self.range + self._like(image)


def _edsr(network: EDSR) -> tuple[list[Unit], nn.Module]:
    units = [Unit("stem", network.conv_first, partial(_first, prepare=_Colour(network).into), "stem")]
    units += [Unit(f"body.{number}", block, stage="body") for number, block in enumerate(network.body)]
    units.append(Unit("body.end", network.conv_after_body, _last))
    return units, _Scaled(network, network.upsample, network.conv_last)


def _rcan(network: RCAN) -> tuple[list[Unit], nn.Module]:
    """As EDSR; messages carry a group's own skip from its first block to its convolution."""
    units = [Unit("stem", network.conv_first, partial(_first, prepare=_Colour(network).into), "stem")]
    for number, group in enumerate(network.body):
        units += _group(f"body.{number}", list(group.residual_group), group.conv)
    units.append(Unit("body.end", network.conv_after_body, _last))
    return units, _Scaled(network, network.upsample, network.conv_last)


def _plainly(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def _group(
    name: str,
    blocks: list[nn.Module],
    convolution: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor] = _plainly,
) -> list[Unit]:
    units = []
    for number, block in enumerate(blocks):
        units.append(Unit(f"{name}.{number}", block, partial(_block, run=run, opens=number == 0), "body"))
    return [*units, Unit(f"{name}.conv", convolution, _close)]


def _block(module: nn.Module, message: Message, *, run: Callable[[nn.Module, Tensor], Tensor], opens: bool) -> Message:
    kept = {"group": message.x} if opens else {}
    return replace(message, features={**message.features, **kept, "x": run(module, message.x)})


def _close(module: nn.Module, message: Message) -> Message:
    features = dict(message.features)
    features["x"] = module(message.x) + features.pop("group")
    return replace(message, features=features)


class _MSRTail(nn.Module):
    def __init__(self, network: MSRResNet) -> None:
        super().__init__()
        steps = [network.upconv1, network.upconv2] if network.upscale == 4 else [network.upconv1]
        self.steps = nn.ModuleList(steps)
        self.conv_hr, self.conv_last = network.conv_hr, network.conv_last
        self.pixel_shuffle, self.lrelu, self.scale = network.pixel_shuffle, network.lrelu, network.upscale

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        for step in self.steps:
            features = self.lrelu(self.pixel_shuffle(step(features)))
        out: Tensor = self.conv_last(self.lrelu(self.conv_hr(features)))
        return out + F.interpolate(image, scale_factor=self.scale, mode="bilinear", align_corners=False)


def _msrresnet(network: MSRResNet) -> tuple[list[Unit], nn.Module]:
    """The global skip is the enlarged image, which the tail adds; the first map is not used again."""
    units = [Unit("stem", nn.Sequential(network.conv_first, network.lrelu), _first_alone, "stem")]
    units += [Unit(f"body.{number}", block, stage="body") for number, block in enumerate(network.body)]
    return units, _MSRTail(network)


def _first_alone(module: nn.Module, message: Message) -> Message:
    return replace(message, features={"x": module(message.x), "image": message.x})


class _NearestTail(nn.Module):
    """Two steps of nearest-neighbour enlargement and convolution, as in RRDBNet and in SwinIR's `nearest+conv`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.before = getattr(network, "conv_before_upsample", nn.Identity())
        self.conv_up1, self.conv_up2 = network.conv_up1, network.conv_up2
        self.conv_hr, self.conv_last, self.lrelu = network.conv_hr, network.conv_last, network.lrelu
        self.colour = _Colour(network) if hasattr(network, "mean") else None

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        features = self.before(features)
        for step in (self.conv_up1, self.conv_up2):
            features = self.lrelu(step(F.interpolate(features, scale_factor=2, mode="nearest")))
        out: Tensor = self.conv_last(self.lrelu(self.conv_hr(features)))
        return out if self.colour is None else self.colour.back(out)


def _rrdbnet(network: RRDBNet) -> tuple[list[Unit], nn.Module]:
    fold = side_multiple(network)
    prepare: Callable[[Tensor], Tensor] = partial(pixel_unshuffle, scale=fold) if fold > 1 else (lambda x: x)
    units = [Unit("stem", network.conv_first, partial(_first, prepare=prepare), "stem")]
    units += [Unit(f"body.{number}", block, stage="body") for number, block in enumerate(network.body)]
    units.append(Unit("body.end", network.conv_body, _last))
    return units, _NearestTail(network)


class _SwinStem(nn.Module):
    """The first convolution; then its maps as normalised tokens."""

    def __init__(self, network: SwinIR) -> None:
        super().__init__()
        self.conv_first, self.patch_embed, self.pos_drop = network.conv_first, network.patch_embed, network.pos_drop
        self.colour = _Colour(network)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        shallow = self.conv_first(self.colour.into(image))
        return shallow, _as_map(self.pos_drop(self.patch_embed(shallow)), image.shape[-2:])


def _as_map(tokens: Tensor, size: Any) -> Tensor:
    """Tokens (N, H W, C) viewed as a map (N, C, H, W)."""
    result: Tensor = tokens.transpose(1, 2).unflatten(2, tuple(size))
    return result


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _swin_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return _as_map(layer(_as_tokens(x), tuple(x.shape[-2:])), x.shape[-2:])


def _swin_first(stem: nn.Module, message: Message) -> Message:
    shallow, x = stem(message.x)
    return replace(message, features={"x": x, "shallow": shallow, "image": message.x})


def _swin_last(end: nn.Module, message: Message) -> Message:
    norm, convolution = end.children()
    x = convolution(_as_map(norm(_as_tokens(message.x)), message.x.shape[-2:])) + message.features["shallow"]
    return replace(message, features={"x": x, "image": message.features["image"]})


def _swinir(network: SwinIR) -> tuple[list[Unit], nn.Module]:
    if network.ape:
        raise ValueError("SwinIR with absolute positions (ape) takes images of one size alone; leave ape out")
    if network.layers[0].residual_group.use_checkpoint:
        raise ValueError("SwinIR's use_checkpoint is not for blocks; leave it out and set local.recompute units")
    units = [Unit("stem", _SwinStem(network), _swin_first, "stem")]
    for number, layer in enumerate(network.layers):
        units += _group(f"layers.{number}", list(layer.residual_group.blocks), layer.conv, _swin_layer)
    units.append(Unit("layers.end", nn.Sequential(network.norm, network.conv_after_body), _swin_last))
    if network.upsampler == "pixelshuffle":
        return units, _Scaled(network, network.conv_before_upsample, network.upsample, network.conv_last)
    if network.upsampler == "pixelshuffledirect":
        return units, _Scaled(network, network.upsample)
    if network.upsampler == "nearest+conv":
        return units, _NearestTail(network)
    raise ValueError(
        f"SwinIR's upsampler {network.upsampler!r} enlarges nothing; give pixelshuffle, pixelshuffledirect or "
        "nearest+conv"
    )
