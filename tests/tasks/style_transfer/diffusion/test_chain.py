"""The UNet as a chain: diffusers' own forward pass to the bit, whole and in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from engine.learning.auxiliary import build_auxiliary
from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.cut import cut_by_count
from engine.network.message import Message
from engine.task import Task
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.diffusion.chain import Layer, TimeEmbedding, example, unet_units
from tasks.style_transfer.lsast.routing import PartOfPrompt, route

KINDS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "as Stable Diffusion 1": {  # the innermost level has no attention, two layers a level, as many heads everywhere
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
    },
    "as Stable Diffusion 2": {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
}


def unet_of(kind: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**Base("tiny").unet().config, **KINDS[kind]}).eval()


def chain_of(unet: UNet2DConditionModel, side: int = 16) -> Chain:
    units, head = unet_units(unet, shared_time=False, shared_prompt=False)
    return Chain(unet, units, head, example(unet, side, 5))


def given(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width), torch.tensor([3, 900]), torch.randn(2, 5, 64)


def message(x: Tensor, t: Tensor, prompt: Tensor, **more: Any) -> Message:
    return Message({"x": x, "t": t, "prompt": prompt, **more})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(16, 16), (17, 22), (9, 8)], ids=str)
def test_the_chain_is_the_unet_to_the_bit(kind: str, sides: tuple[int, int]) -> None:
    unet = unet_of(kind)
    made = given(*sides)
    assert torch.equal(chain_of(unet)(message(*made)), unet(*made).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_unets_to_the_bit(kind: str) -> None:
    found = []
    for whole in (True, False):
        unet = unet_of(kind)
        made = given()
        prediction = unet(*made).sample if whole else chain_of(unet)(message(*made))
        prediction.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnets_residuals_are_added_where_diffusers_adds_them(kind: str) -> None:
    unet = unet_of(kind)
    control = ControlNetModel.from_unet(unet)
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    x, t, prompt = given()
    residuals, middle = control(x, t, prompt, torch.rand(2, 3, 128, 128), return_dict=False)
    wanted = unet(x, t, prompt, down_block_additional_residuals=residuals, mid_block_additional_residual=middle).sample
    assert not torch.equal(wanted, unet(x, t, prompt).sample)
    assert torch.equal(chain_of(unet)(message(x, t, prompt, control=list(residuals), control_mid=middle)), wanted)


def test_units_are_the_layers_each_level_beginning_with_its_stride() -> None:
    names = [unit.name for unit in chain_of(unet_of("as Stable Diffusion 1")).units]
    assert names == [
        *("conv_in", "down0.0", "down0.1", "down1.0", "down1.1", "down2.0", "down2.1", "down3.0", "down3.1"),
        *("mid.0", "mid.1", "up0.0", "up0.1", "up0.2", "up1.0", "up1.1", "up1.2"),
        *("up2.0", "up2.1", "up2.2", "up3.0", "up3.1", "up3.2"),
    ]
    sides = [shape.x.shape[-1] for shape in chain_of(unet_of("as Stable Diffusion 1")).shapes()]
    assert sides == [16] * 3 + [8] * 2 + [4] * 2 + [2] * 7 + [4] * 3 + [8] * 3 + [16] * 3


def test_what_travels() -> None:
    """The way down leaves skips, the way up takes them; the time is embedded once."""
    shapes = chain_of(unet_of("tiny")).shapes()
    assert [len(shape.features["skips"]) for shape in shapes] == [1, 2, 4, 6, 6, 6, 5, 4, 3, 2, 1, 0]
    assert {name for shape in shapes for name in shape.features} == {"x", "t", "time", "prompt", "skips"}


def test_the_time_may_be_embedded_by_a_shared_encoder() -> None:
    unet = unet_of("tiny")
    units, head = unet_units(unet, shared_time=True, shared_prompt=False)

    def embed(time: torch.nn.Module, message: Message) -> Message:
        return Message({**message.features, "time": time(message.features["t"], message.x)})

    shared = Unit("time", TimeEmbedding(unet), embed)
    chain = Chain(unet, units, head, example(unet, 16, 5), shared=shared, shared_names=("time",))
    made = given()
    assert torch.equal(chain(message(*made)), unet(*made).sample)


class Heads(Task):
    """As much of a task as auxiliary networks ask for."""

    name = "heads"

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> torch.nn.Module:
        from tasks.style_transfer.diffusion.chain import light_end

        return light_end(chain, message, chain.model)


SPECS: list[Any] = [
    "greedy",
    "glcan",
    {"type": "glcan", "reduce": 1, "width": 0.5, "depth": 1},
    {"type": "glcan", "width": 0.25},
    {"type": "glcan", "use_bank": False, "reduce": 1},
]
FAST = [("tiny", SPECS[0]), ("tiny", SPECS[2]), ("as Stable Diffusion 2", SPECS[1])]


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        pytest.param(kind, spec, marks=[] if (kind, spec) in FAST else [pytest.mark.slow])
        for kind in KINDS
        for spec in SPECS
    ],
    ids=str,
)
def test_auxiliary_networks_predict_from_every_block(kind: str, spec: Any) -> None:
    """Of every place that a block may end: the prediction has the latents' shape, and everything in them learns."""
    chain = chain_of(unet_of(kind))
    made = message(*given())
    for unit, span in zip(chain.units, cut_by_count(chain, len(chain)), strict=True):
        made = unit(made).detach()
        if span.last:
            break
        auxiliary = build_auxiliary(spec, chain, span, FeatureBank(), Heads(None), seed=0)
        prediction = auxiliary(made, FeatureBank())
        assert prediction.shape == (2, 4, 16, 16)
        prediction.square().mean().backward()
        for name, parameter in auxiliary.named_parameters():
            assert parameter.grad is not None, (unit.name, name)


def test_the_local_part_is_thin_layers_of_the_levels_to_come_on_the_way_down() -> None:
    chain = chain_of(unet_of("as Stable Diffusion 1"))
    spec = {"type": "glcan", "width": 0.5, "depth": 1, "reduce": 1}
    network = build_auxiliary(spec, chain, cut_by_count(chain, 10)[0], FeatureBank(), Heads(None), seed=0)
    assert [unit.name for unit in network.local_units] == ["down1.0", "down2.0", "down3.0", "mid.0"]
    channels = [unit.module.resnet.out_channels for unit in network.local_units]
    assert channels == [16, 32, 32, 32]
    assert [unit.module.sampler is not None for unit in network.local_units] == [True, True, True, False]


def test_the_global_part_is_one_skip_of_every_resolution() -> None:
    chain = chain_of(unet_of("as Stable Diffusion 1"))
    spans = {chain.units[span.stop - 1].name: span for span in cut_by_count(chain, len(chain))}
    spec = {"type": "glcan", "width": 0.5, "depth": 1, "reduce": 1}
    for unit, levels in {"conv_in": 4, "down2.1": 4, "mid.0": 4, "up0.2": 3, "up2.0": 2, "up3.1": 1}.items():
        network = build_auxiliary(spec, chain, spans[unit], FeatureBank(), Heads(None), seed=0)
        assert len(network.head.levels) == levels, unit


def test_thin_layers_keep_reading_their_part_of_the_prompt() -> None:
    unet = unet_of("tiny")
    route(unet, "paper")
    chain = chain_of(unet)
    layer = chain.units[chain.index("down1.0")].module
    assert isinstance(layer, Layer)
    for copied in (layer.thinned(0.5), chain.units[chain.index("down1.0")].copy().module):
        processor = copied.attention.transformer_blocks[0].attn2.processor
        assert isinstance(processor, PartOfPrompt)
        assert processor.part == 1
