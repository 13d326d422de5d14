"""Auxiliary networks for super-resolution."""

import pytest
import torch
from torch import nn

from engine.learning.auxiliary import build_auxiliary, known_families
from engine.network.bank import FeatureBank
from engine.network.cut import Span
from engine.network.message import Message
from tasks.super_resolution.chain import network_chain
from tasks.super_resolution.heads import LightTail, enlarged, upsampling
from tasks.super_resolution.task import Upscaling
from tests.tasks.super_resolution.networks import EVERY_KIND, image, small_network


def message(channels: int = 8, side: int = 12) -> Message:
    maps = image(2, channels, side, side)
    return Message({"x": maps, "shallow": maps * 2, "image": image(2, 3, side, side)})


@pytest.mark.parametrize(("kind", "scale"), EVERY_KIND)
@pytest.mark.parametrize("family", ["glcan", "greedy", "local_sr"])
@pytest.mark.parametrize("tail", ["direct", "own"])
def test_every_network_has_auxiliary_networks_at_every_cut(kind: str, scale: int, family: str, tail: str) -> None:
    chain = network_chain(small_network(kind, scale))
    task = Upscaling(scale, tail)
    low = image(2, 3, 16, 16)
    x = Message({"x": low})
    for stop, unit in enumerate(chain.units, start=1):
        x = unit(x)
        auxiliary = build_auxiliary(family, chain, Span(0, 2, max(0, stop - 2), stop), FeatureBank(), task, 0)
        prediction = auxiliary(x, FeatureBank())
        assert prediction.shape == (2, 3, 16 * scale, 16 * scale)
        task.loss(prediction, image(2, 3, 16 * scale, 16 * scale)).backward()
        silent = [name for name, p in auxiliary.named_parameters() if p.grad is None]
        assert not silent, "every parameter learns"
        x = x.detach()


def test_the_local_part_is_of_units_still_to_come_and_no_longer_than_the_block() -> None:
    chain = network_chain(small_network("EDSR", num_block=6))
    task = Upscaling(2, "direct")

    def local(start: int, stop: int, **options: object) -> list[str]:
        spec = {"type": "glcan", **options}
        network = build_auxiliary(spec, chain, Span(0, 2, start, stop), FeatureBank(), task, 0)
        return [unit.name for unit in network.local_units]

    assert local(0, 3) == ["body.2", "body.3"]
    assert local(2, 3) == ["body.2"], "a small block gets a small auxiliary network"
    assert local(0, 6) == ["body.5"]
    assert local(0, 7) == [], "the last convolution has weights of its own in the head"
    assert local(0, 4, depth=3) == ["body.3", "body.4", "body.5"]


def test_thinner_local_parts() -> None:
    chain = network_chain(small_network("EDSR"))
    half = build_auxiliary(
        {"type": "glcan", "width": 0.5}, chain, Span(0, 2, 0, 3), FeatureBank(), Upscaling(2, "own"), 0
    )
    assert half.local_modules[0].conv1.weight.shape[:2] == (4, 4)
    assert half.head.skip.weight.shape[:2] == (4, 8), "the early map is brought to as many channels"
    swinir, spec = network_chain(small_network("SwinIR")), {"type": "glcan", "width": 0.5}
    whole = build_auxiliary(spec, swinir, Span(0, 2, 0, 2), FeatureBank(), Upscaling(2, "own"), 0)
    assert all("stays at full width in GLCAN's local part" in said for said in whole.remarks)
    assert isinstance(whole.narrow, nn.Identity)


def test_other_resolutions_and_families_are_refused() -> None:
    chain, task = network_chain(small_network("EDSR")), Upscaling(2, "direct")
    with pytest.raises(ValueError, match="reduce must be 1 for super-resolution"):
        build_auxiliary({"type": "glcan", "reduce": 2}, chain, Span(0, 2, 0, 2), FeatureBank(), task, 0)
    with pytest.raises(ValueError, match="'dgl' is not for super_resolution"):
        build_auxiliary("dgl", chain, Span(0, 2, 0, 2), FeatureBank(), task, 0)
    msrresnet = network_chain(small_network("MSRResNet"))
    with pytest.raises(ValueError, match="reduce must be 1 for super-resolution"):
        build_auxiliary({"type": "glcan", "reduce": 2}, msrresnet, Span(0, 2, 0, 2), FeatureBank(), task, 0)
    assert {"glcan", "greedy", "local_sr"} <= set(known_families(task))


def test_the_early_map_is_added_and_a_difference_to_bicubic_predicted() -> None:
    head = LightTail(8, 8, 2, 2, "direct", image_range=1.0)
    given = message()
    without = Message({"x": given.x, "image": given.features["image"]})
    added = Message({"x": given.x + 0, "shallow": torch.zeros_like(given.x), "image": given.features["image"]})
    assert head(added, FeatureBank()).equal(head(without, FeatureBank()))
    assert not torch.allclose(head(given, FeatureBank()), head(without, FeatureBank()))
    torch.nn.init.zeros_(head.upsample[0].weight)
    torch.nn.init.zeros_(head.upsample[0].bias)
    assert head(given, FeatureBank()).equal(enlarged(given.features["image"], 2))


def test_the_released_recipe_has_three_convolutions_at_full_width_and_an_own_tail() -> None:
    chain = network_chain(small_network("EDSR", 4))
    network = build_auxiliary("local_sr", chain, Span(0, 2, 0, 3), FeatureBank(), Upscaling(4, "direct"), 0)
    shapes = [tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")]
    assert shapes == [(8, 8, 3, 3)] * 3 + [(32, 8, 3, 3)] * 2 + [(3, 8, 3, 3)]


def test_without_the_global_part_neither_the_early_map_nor_the_image_counts() -> None:
    chain, given = network_chain(small_network("EDSR")), message(side=48)
    other = Message({**given.features, "shallow": given.x * 3, "image": given.features["image"] / 2})
    for use_bank in (True, False):
        spec = {"type": "glcan", "use_bank": use_bank}
        network = build_auxiliary(spec, chain, Span(0, 2, 0, 3), FeatureBank(), Upscaling(2, "direct"), 0)
        assert network(given, FeatureBank()).equal(network(other, FeatureBank())) != use_bank


@pytest.mark.parametrize("larger", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tail", ["direct", "own"])
def test_tails_enlarge_as_often_as_they_say(larger: int, tail: str) -> None:
    assert upsampling(4, larger, tail)(torch.rand(1, 4, 5, 6)).shape == (1, 3, 5 * larger, 6 * larger)
