"""Which cross-attention layer reads which of the prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from tasks.style_transfer.lsast.routing import PartOfPrompt, route
from tests.tasks.style_transfer.diffusion.test_chain import KINDS, unet_of

PAPER = {
    "tiny": {"down_blocks": [2, 1, 0], "mid_block": [0], "up_blocks": [0, 1, 2]},
    "as Stable Diffusion 1": {"down_blocks": [2, 1, 0, None], "mid_block": [0], "up_blocks": [None, 0, 1, 2]},
    "four levels with attention": {"down_blocks": [2, 1, 0, 0], "mid_block": [0], "up_blocks": [0, 0, 1, 2]},
}
"""Parts by level, None where there is no attention: innermost first, the third outermost."""
LAYERS = {"tiny": (1, 2), "as Stable Diffusion 1": (2, 3), "four levels with attention": (2, 3)}
"""Of a level, on the way down and up."""
FORMS = pytest.mark.parametrize("form", ["paper", "released"])


def unet(kind: str) -> UNet2DConditionModel:
    if kind in KINDS:
        return unet_of(kind)
    every = {"down_block_types": ("CrossAttnDownBlock2D",) * 4, "up_block_types": ("CrossAttnUpBlock2D",) * 4}
    made: UNet2DConditionModel = UNet2DConditionModel.from_config({**unet_of("as Stable Diffusion 1").config, **every})
    return made.eval()


def expected(kind: str, form: str) -> dict[str, int]:
    """Part by layer."""
    found, (down, up) = dict[str, int](), LAYERS[kind]
    for place, parts in PAPER[kind].items():
        for level, part in enumerate(parts):
            if part is None:
                continue
            if form == "released":
                part = ["down_blocks", "mid_block", "up_blocks"].index(place)
            where = place if place == "mid_block" else f"{place}.{level}"
            for layer in range({"down_blocks": down, "mid_block": 1, "up_blocks": up}[place]):
                found[f"{where}.attentions.{layer}.transformer_blocks.0.attn2"] = part
    return found


def processors(network: nn.Module, kind: str = "attn2") -> dict[str, Any]:
    return {name: module.processor for name, module in network.named_modules() if name.endswith(kind)}


def parts(network: nn.Module) -> dict[str, int]:
    return {name: each.part for name, each in processors(network).items()}


@FORMS
@pytest.mark.parametrize("kind", PAPER)
def test_every_layer_reads_its_part(kind: str, form: str) -> None:
    network = unet(kind)
    before = processors(network)
    route(network, form)
    assert parts(network) == expected(kind, form)
    for name, each in processors(network).items():
        assert type(each) is PartOfPrompt
        assert each.processor is before[name]
    assert not any(isinstance(each, PartOfPrompt) for each in processors(network, "attn1").values())


@pytest.mark.parametrize("kind", PAPER)
def test_routed_again_it_does_not_nest(kind: str) -> None:
    network = unet(kind)
    before = processors(network)
    for form in ("paper", "released", "released", "paper"):
        route(network, form)
        assert parts(network) == expected(kind, form)
        assert all(each.processor is before[name] for name, each in processors(network).items())


@FORMS
@pytest.mark.parametrize("kind", PAPER)
def test_a_controlnet_is_routed_as_the_way_down(kind: str, form: str) -> None:
    network = unet(kind)
    control = ControlNetModel.from_unet(network)
    route(control, form)
    assert parts(control) == {name: part for name, part in expected(kind, form).items() if not name.startswith("up")}
    assert not any(isinstance(each, PartOfPrompt) for each in processors(network).values()), "the UNet has its own"


def few(levels: int) -> UNet2DConditionModel:
    """Attention at so many of three resolutions."""
    config = {
        "down_block_types": ["CrossAttnDownBlock2D"] * levels + ["DownBlock2D"] * (3 - levels),
        "up_block_types": ["UpBlock2D"] * (3 - levels) + ["CrossAttnUpBlock2D"] * levels,
    }
    made: UNet2DConditionModel = UNet2DConditionModel.from_config({**unet_of("tiny").config, **config})
    return made.eval()


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_few_resolutions_are_refused_for_the_papers_form_alone(levels: int) -> None:
    network = few(levels)
    said = rf"^prompt.form: the paper's form needs 3 resolutions with cross-attention, .* {levels}; take `released`$"
    for each in (network, ControlNetModel.from_unet(network)):
        with pytest.raises(ValueError, match=said):
            route(each, "paper")
        assert not any(isinstance(found, PartOfPrompt) for found in processors(each).values())
    route(network, "released")
    assert set(parts(network).values()) == ({0, 1, 2} if levels else {1})


def given(tokens: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 7, 64), torch.randn(2, 3 * tokens, 64)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_is_exactly_its_third(part: int) -> None:
    layer = unet("tiny").down_blocks[1].attentions[0].transformer_blocks[0].attn2
    x, prompts = given()
    wanted = layer(x, encoder_hidden_states=prompts[:, part * 5 : part * 5 + 5])
    layer.set_processor(PartOfPrompt(layer.processor, part))
    others = torch.full_like(prompts, torch.nan)
    others[:, part * 5 : part * 5 + 5] = prompts[:, part * 5 : part * 5 + 5]
    for each in (prompts, others):
        assert torch.equal(layer(x, encoder_hidden_states=each), wanted)
    assert not torch.allclose(layer(x, encoder_hidden_states=prompts.roll(5, 1)), wanted, atol=1e-4)


@FORMS
def test_with_three_equal_prompts_the_unet_is_as_before(form: str) -> None:
    network = unet("as Stable Diffusion 1")
    x, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 64)
    wanted = network(x, t, prompt).sample
    route(network, form)
    assert torch.equal(network(x, t, prompt.repeat(1, 3, 1)).sample, wanted)


@FORMS
def test_each_prompt_is_read_somewhere(form: str) -> None:
    network = unet("as Stable Diffusion 1")
    route(network, form)
    prompts = torch.randn(1, 15, 64, requires_grad=True)
    network(torch.randn(1, 4, 8, 8), torch.tensor([5]), prompts).sample.square().mean().backward()
    assert prompts.grad is not None
    assert all(part.abs().sum() > 0 for part in prompts.grad.split(5, 1))
