"""Stable Diffusion's UNet as a chain: a unit is one layer of a level, and the message carries the stack of skips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.message import Message


class Layer(nn.Module):
    """An optional change of resolution, a residual block, and an optional transformer.

    The downsampler or upsampler, which diffusers keeps at the end of a level, is here at the start of the next level.
    So the first unit of a level has the stride, which GLCAN relies on.
    """

    def __init__(self, sampler: nn.Module | None, resnet: ResnetBlock2D, attention: Transformer2DModel | None) -> None:
        super().__init__()
        self.sampler, self.resnet, self.attention = sampler, resnet, attention

    def thinned(self, width: float) -> Layer:
        """A new layer of this kind with ``width`` times the channels; for layers on the way down or in the middle."""
        before, after = (_scaled(channels, width) for channels in (self.resnet.in_channels, self.resnet.out_channels))
        sampler = None
        if self.sampler is not None:
            sampler = Downsample2D(before, use_conv=True, out_channels=before, padding=self.sampler.padding, name="op")
        time = self.resnet.time_emb_proj
        resnet = residual_block(
            before, after, time.in_features if time is not None else None, self.resnet.norm1.num_groups
        )
        return Layer(sampler, resnet, _thin_transformer(self.attention, width) if self.attention is not None else None)

    def attend(self, x: Tensor, message: Message) -> Tensor:
        """Apply the residual block and the transformer."""
        x = self.resnet(x, message.features["time"])
        if self.attention is None:
            return x
        result: Tensor = self.attention(x, encoder_hidden_states=message.features["prompt"], return_dict=False)[0]
        return result


def residual_block(before: int, after: int, time: int | None, groups: int) -> ResnetBlock2D:
    """A residual block of diffusers whose normalisations have as many groups as divide the channels."""
    return ResnetBlock2D(
        in_channels=before,
        out_channels=after,
        temb_channels=time,
        groups=math.gcd(groups, before),
        groups_out=math.gcd(groups, after),
        eps=1e-5,
        non_linearity="silu",
    )


def _thin_transformer(attention: Transformer2DModel, width: float) -> Transformer2DModel:
    channels = _scaled(attention.config.in_channels, width)
    most = max(1, round(attention.config.num_attention_heads * width))
    heads = next(count for count in range(most, 0, -1) if channels % count == 0)
    thin = Transformer2DModel.from_config(
        attention.config,
        in_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=channels // heads,
        norm_num_groups=math.gcd(attention.config.norm_num_groups, channels),
    )
    # Layers that read a prompt of their own (LSAST) go on doing so.
    for new, old in zip(thin.transformer_blocks, attention.transformer_blocks, strict=True):
        new.attn2.set_processor(old.attn2.processor)
    result: Transformer2DModel = thin
    return result


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class TimeEmbedding(nn.Module):
    """The UNet's timestep embedding, which every residual block reads."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.project, self.embedding = unet.time_proj, unet.time_embedding

    def forward(self, t: Tensor, like: Tensor) -> Tensor:
        result: Tensor = self.embedding(self.project(t).to(like.dtype))
        return result


class First(nn.Module):
    """``conv_in``, and the timestep embedding unless a shared encoder computes it."""

    def __init__(self, unet: UNet2DConditionModel, time: TimeEmbedding | None) -> None:
        super().__init__()
        self.conv_in, self.time = unet.conv_in, time


class End(nn.Module):
    """The UNet's last normalisation and convolution, which make the prediction."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.norm, self.act, self.conv = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(self.act(self.norm(x)))
        return result


def unet_units(unet: UNet2DConditionModel, *, shared_time: bool, shared_prompt: bool) -> tuple[list[Unit], Unit]:
    """Units and head: ``conv_in``, ``down0.0``, ..., ``mid.0``, ..., ``up0.0``, ..., and ``conv_out``.

    Besides ``x``, messages carry ``time`` (the timestep embedding), ``prompt`` (N, tokens, width) and ``skips`` (those
    that the way up has yet to read). The first message may also carry the output of a ControlNet, ``control`` (one
    tensor per skip) and ``control_mid``.

    Args:
        shared_time: whether a shared encoder puts ``time`` into the message before the first unit.
        shared_prompt: whether the prompts learn, so that even frozen layers that read them have something to train.
    """
    first = First(unet, None if shared_time else TimeEmbedding(unet))
    units, sampler = [Unit("conv_in", first, _enter)], None
    for level, down in enumerate(unet.down_blocks):
        attentions = getattr(down, "attentions", [None] * len(down.resnets))
        for n, (resnet, attention) in enumerate(zip(down.resnets, attentions, strict=True)):
            layer, sampler = Layer(sampler, resnet, attention), None
            conditioned = shared_prompt and attention is not None
            units.append(Unit(f"down{level}.{n}", layer, _down, f"down{level}", conditioned))
        (sampler,) = down.downsamplers or (None,)
    middle = unet.mid_block
    for n, resnet in enumerate(middle.resnets):
        # In diffusers the middle is a residual block, then pairs of a transformer and a residual block. So each unit
        # but the last is a residual block with the transformer after it.
        attention = middle.attentions[n] if n < len(middle.attentions) else None
        forward = _middle_last if n == len(middle.resnets) - 1 else _middle
        conditioned = shared_prompt and attention is not None
        units.append(Unit(f"mid.{n}", Layer(None, resnet, attention), forward, "mid", conditioned))
    for level, up in enumerate(unet.up_blocks):
        attentions = getattr(up, "attentions", [None] * len(up.resnets))
        for n, (resnet, attention) in enumerate(zip(up.resnets, attentions, strict=True)):
            layer, sampler = Layer(sampler, resnet, attention), None
            conditioned = shared_prompt and attention is not None
            units.append(Unit(f"up{level}.{n}", layer, _up, conditioned=conditioned))
        (sampler,) = up.upsamplers or (None,)
    return units, Unit("conv_out", End(unet))


def _enter(first: Any, message: Message) -> Message:
    features = dict(message.features)
    x = message.x
    if first.time is not None:
        features["time"] = first.time(features["t"], x)
    x = first.conv_in(x)
    return _pushed(replace(message, features={**features, "skips": []}), x)


def _down(layer: Any, message: Message) -> Message:
    x = message.x
    if layer.sampler is not None:
        x = layer.sampler(x)
        message = _pushed(message, x)
    return _pushed(message, layer.attend(x, message))


def _pushed(message: Message, x: Tensor) -> Message:
    """A message with ``x`` as features and as one more skip, to which a ControlNet's tensor for it is added."""
    features = {**message.features, "x": x}
    skip, control = x, features.get("control")
    if control:
        skip, features["control"] = x + control[0], control[1:]
    features["skips"] = [*message.features["skips"], skip]
    return replace(message, features=features)


def _middle(layer: Any, message: Message) -> Message:
    return message.with_x(layer.attend(message.x, message))


def _middle_last(layer: Any, message: Message) -> Message:
    features = dict(message.features)
    x = layer.attend(message.x, message)
    if "control_mid" in features:
        x = x + features.pop("control_mid")
    features.pop("control", None)
    return replace(message, features={**features, "x": x})


def _up(layer: Any, message: Message) -> Message:
    *skips, skip = message.features["skips"]
    x = message.x
    if layer.sampler is not None:
        # As in diffusers: a side that does not divide evenly is brought to that of the skip.
        x = layer.sampler(
            x, None if 2 * x.shape[-1] == skip.shape[-1] and 2 * x.shape[-2] == skip.shape[-2] else skip.shape[2:]
        )
    x = layer.attend(torch.cat([x, skip], dim=1), message)
    return replace(message, features={**message.features, "x": x, "skips": skips})


class LightDenoiserEnd(nn.Module):
    """The end of an auxiliary network: up through the resolutions with the available skips, to a prediction.

    GLCAN's global part is the message's skips, that is the features of earlier blocks which the backbone itself
    concatenates on its way up; of every resolution the last skip is used. Each resolution has one thin residual block,
    which reads the timestep embedding. Without skips (greedy), the end is one convolution and a pixel shuffle.

    Args:
        channels: channels of the features.
        skips: index in the message's list and number of channels of each skip to use, from the smallest resolution up.
        width: channels of the residual blocks.
        time: width of the timestep embedding; None if it is not read.
        larger: how many times larger the prediction is than the output of the residual blocks.
    """

    def __init__(
        self, channels: int, skips: Sequence[tuple[int, int]], width: int, time: int | None, groups: int, larger: int
    ) -> None:
        super().__init__()
        self.places, self.larger, self.reads_time = [place for place, _ in skips], larger, time is not None
        self.narrow = nn.Conv2d(channels, width, 1)
        self.levels = nn.ModuleList(residual_block(width + more, width, time, groups) for _, more in skips)
        self.norm = nn.GroupNorm(math.gcd(groups, width), width)
        self.prediction = nn.Conv2d(width, 4 * larger**2, 3, padding=1)

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        x, time = self.narrow(message.x), message.features["time"] if self.reads_time else None
        for place, level in zip(self.places, self.levels, strict=True):
            skip = message.features["skips"][place]
            if skip.shape[2:] != x.shape[2:]:
                x = F.interpolate(x, skip.shape[2:], mode="nearest")
            x = level(torch.cat([x, skip], dim=1), time)
        return F.pixel_shuffle(self.prediction(F.silu(self.norm(x))), self.larger)


def light_end(chain: Chain, features: Message, unet: UNet2DConditionModel) -> LightDenoiserEnd:
    """The end for features like ``features``, which were made from the chain's example."""
    last: dict[int, tuple[int, int]] = {}
    least = side = features.x.shape[-1]
    for place, skip in enumerate(features.features.get("skips", ())):
        if skip.shape[-1] >= least:
            last[skip.shape[-1]] = place, skip.shape[1]
    if last:
        side = max(last)
    time = features.features.get("time")
    width = max(unet.config.norm_num_groups, unet.config.block_out_channels[0] // 2)
    return LightDenoiserEnd(
        features.x.shape[1],
        [last[size] for size in sorted(last)],
        width,
        None if time is None else time.shape[1],
        unet.config.norm_num_groups,
        chain.example.x.shape[-1] // side,
    )


def example(unet: UNet2DConditionModel, side: int, tokens: int, **features: Any) -> Message:
    """A message for the first unit, to infer shapes: two latents of ``side``, and prompts of ``tokens`` tokens."""
    made = {
        "x": torch.zeros(2, unet.config.in_channels, side, side),
        "t": torch.zeros(2, dtype=torch.long),
        "prompt": torch.zeros(2, tokens, unet.config.cross_attention_dim),
    }
    return Message({**made, **features})
