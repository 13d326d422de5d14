"""BasicSR's networks as chains."""

import pytest
import torch
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from torch import nn

from engine.network.message import Message
from tasks.super_resolution.chain import enlargement, network_chain
from tests.tasks.super_resolution.networks import EVERY_KIND, SMALL, image, small_network


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("kind", "scale"), EVERY_KIND)
def test_the_chain_is_the_network_to_the_bit(kind: str, scale: int) -> None:
    network = small_network(kind, scale)
    low, high = image(2, 3, 16, 16), image(2, 3, 16 * scale, 16 * scale)
    torch.manual_seed(0)  # SwinIR drops paths at random
    theirs = network(low)
    (theirs - high).abs().mean().backward()
    wanted = gradients(network)
    torch.manual_seed(0)
    ours = network_chain(network)(Message({"x": low}))
    (ours - high).abs().mean().backward()
    found = gradients(network)
    assert ours.equal(theirs)
    assert found.keys() == wanted.keys()
    assert len(found) > 10
    if kind == "SwinIR":  # where gradients of three branches meet, they are added in another order
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-8) for name in wanted)
    else:
        assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "options", [{"upsampler": "pixelshuffledirect"}, {"resi_connection": "3conv"}, {"drop_rate": 0.1}]
)
def test_other_forms_of_swinir(options: dict[str, object]) -> None:
    network = small_network("SwinIR", **options)
    low = image(2, 3, 16, 16)
    torch.manual_seed(0)
    theirs = network(low)
    torch.manual_seed(0)
    assert network_chain(network)(Message({"x": low})).equal(theirs)


def test_swinir_with_the_window_that_basicsr_gives_it() -> None:
    chain = network_chain(small_network("SwinIR", window_size=7, img_size=14))
    assert chain.example.x.shape[-1] == 49
    assert enlargement(chain) == 2


@pytest.mark.parametrize("kind", ["EDSR", "SwinIR"])
def test_images_are_not_for_half_precision(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert network_chain(small_network(kind))(Message({"x": image(1, 3, 16, 16)})).dtype == torch.float32


def test_swinir_with_nearest_neighbours() -> None:
    network = small_network("SwinIR", 4, upsampler="nearest+conv").eval()
    low = image(1, 3, 16, 24)  # not the size it was built for
    assert network_chain(network)(Message({"x": low})).equal(network(low))


def test_what_travels_between_units() -> None:
    shapes = network_chain(small_network("EDSR")).shapes()
    assert [set(message.features) for message in (shapes[0], shapes[3], shapes[-1])] == [
        {"x", "shallow", "image"},
        {"x", "shallow", "image"},
        {"x", "image"},
    ]
    assert shapes[0].features["image"].shape[1] == 3
    rcan = network_chain(small_network("RCAN"))
    names = [unit.name for unit in rcan.units]
    assert names == ["stem", "body.0.0", "body.0.1", "body.0.conv", "body.1.0", "body.1.1", "body.1.conv", "body.end"]
    assert "group" in rcan.shapes()[names.index("body.0.1")].features, "a group's skip, up to its end"
    assert "group" not in rcan.shapes()[names.index("body.0.conv")].features
    swinir = network_chain(small_network("SwinIR"))
    assert swinir.units[1].name == "layers.0.0"
    assert swinir.shapes()[1].x.shape[1:] == (8, 48, 48)


@pytest.mark.parametrize("kind", SMALL)
def test_a_tail_in_parts_gives_the_same_image_and_gradients(kind: str) -> None:
    network = small_network(kind)
    low, high = image(5, 3, 16, 16), image(5, 3, 32, 32)
    found = []
    for parts in (1, 2, 9):  # more parts than images are as many as images
        torch.manual_seed(0)
        prediction = network_chain(network, parts)(Message({"x": low}))
        (prediction - high).square().mean().backward()
        found.append((prediction.detach(), gradients(network)))
    for prediction, own in found[1:]:
        assert torch.allclose(prediction, found[0][0], atol=1e-6)
        assert all(torch.allclose(own[name], found[0][1][name], rtol=1e-3, atol=1e-6) for name in own)


def test_a_tail_in_parts_keeps_nothing_of_the_high_resolution() -> None:
    network = small_network("EDSR", 4)
    kept = []
    for parts in (1, 4):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            network_chain(network, parts)(Message({"x": image(4, 3, 16, 16)}))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_other_networks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="SRVGGNetCompact is none of BasicSR's EDSR, RCAN, MSRResNet"):
        network_chain(SRVGGNetCompact())
    with pytest.raises(ValueError, match="upsampler '' enlarges nothing"):
        network_chain(small_network("SwinIR", upsampler="").train())
    with pytest.raises(ValueError, match="SwinIR's use_checkpoint is not for blocks"):
        network_chain(small_network("SwinIR", use_checkpoint=True))
    with pytest.raises(ValueError, match="SwinIR with absolute positions .ape. takes images of one size alone"):
        network_chain(small_network("SwinIR", ape=True))
    with pytest.raises(ValueError, match=r"EDSR does not take images \(3, 48, 48\)"):
        network_chain(small_network("EDSR", num_in_ch=1))
