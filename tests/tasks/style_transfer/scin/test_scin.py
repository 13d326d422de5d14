"""SCIN, AdaIN, the Perception Encoder and attention, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.style_transfer.scin.attention import CrossAttention
from tasks.style_transfer.scin.encoder import CODE, FAR, NEAR, PerceptionEncoder, style_code, vgg_style
from tasks.style_transfer.scin.instance import InstanceNorm, give, instance_statistics, look
from tasks.style_transfer.scin.scin import SCIN, AdaIN, mixed


def image(n: int = 2, side: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def maps(n: int = 2, channels: int = 8, side: int = 6, seed: int = 1) -> Tensor:
    return 3 + 2 * torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def styled(n: int = 2, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"style": image(n, seed=seed), "style_code": torch.randn(n, CODE, generator=generator)}


def trained(channels: int = 8) -> SCIN:
    """As after some training: its last layer is no longer zero."""
    torch.manual_seed(0)
    scin = SCIN(channels, 16, 16, 1)
    torch.nn.init.normal_(scin.affine.weight)
    torch.nn.init.normal_(scin.affine.bias)
    return scin


def affine(scin: SCIN, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """gamma and beta, read off two constant-free probes: SCIN is affine in the normalised input."""
    probe = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(len(features["style"]), 8, 1, 2)
    out = scin(probe, features)
    return (out[..., 1] - out[..., 0])[..., 0] / 2, out.mean((2, 3))


def test_statistics_after_scin_are_gamma_and_beta() -> None:
    scin, features = trained(), styled()
    gamma, beta = affine(scin, features)
    mean, deviation = instance_statistics(scin(maps(), features))
    torch.testing.assert_close(mean.flatten(1), beta, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deviation.flatten(1), gamma.abs(), atol=1e-3, rtol=1e-3)


def test_scin_starts_as_plain_instance_normalisation() -> None:
    x = maps()
    torch.testing.assert_close(SCIN(8, 32, 16, 1)(x, styled()), F.instance_norm(x), atol=1e-5, rtol=1e-5)


def test_a_constant_map_becomes_beta() -> None:
    """Nothing is divided by zero, whatever the constant."""
    scin, features = trained(), styled()
    _, beta = affine(scin, features)
    for constant in (0.0, 1.0, -20.0):
        out = scin(torch.full((2, 8, 5, 5), constant), features)
        torch.testing.assert_close(out, beta[..., None, None].expand_as(out), atol=5e-3, rtol=1e-3)


def test_shift_and_scale_of_the_content_change_nothing() -> None:
    scin, features, x = trained(), styled(), maps()
    torch.testing.assert_close(scin(5 * x - 7, features), scin(x, features), atol=1e-4, rtol=1e-4)


def test_moving_the_content_moves_the_result() -> None:
    """A shift in space: statistics are those of the same pixels."""
    scin, features, x = trained(), styled(), maps()
    torch.testing.assert_close(scin(x.roll(2, 3), features), scin(x, features).roll(2, 3), atol=1e-5, rtol=1e-5)


def test_scale_and_bias_depend_on_the_painting_alone() -> None:
    scin, one, other = trained(), styled(), styled(seed=5)
    first, second = affine(scin, one), affine(scin, other)
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    swapped = affine(scin, {name: value.flip(0) for name, value in one.items()})
    torch.testing.assert_close(swapped[0], first[0].flip(0))
    torch.testing.assert_close(swapped[1], first[1].flip(0))


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_paintings_of_any_size_and_every_stage(side: int) -> None:
    scin = SCIN(4, side, 16, 1)
    assert scin.embed.kernel_size == (side // 8, side // 8)
    features = {"style": torch.rand(1, 3, 40, 300), "style_code": torch.zeros(1, CODE)}
    assert scin(maps(1, 4), features).shape == (1, 4, 6, 6)


def test_no_two_layers_of_a_transformer_start_alike() -> None:
    layers = SCIN(4, 16, 16, 2).layers
    for (name, first), second in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        if first.dim() == 2:
            assert not torch.equal(first, second), name


def test_adain_gives_the_paintings_statistics() -> None:
    style = maps(seed=4) * torch.linspace(0.5, 2, 8).view(1, 8, 1, 1)
    wanted = instance_statistics(style)
    found = instance_statistics(AdaIN(1)(maps(), {"style_statistics": [None, wanted]}))
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)


def test_given_statistics_replace_the_tiles_own() -> None:
    x, norm = maps(), InstanceNorm()
    whole = norm(x)
    give(norm, None, notes=True)
    norm(x)
    seen = look(norm)
    give(norm, seen)
    torch.testing.assert_close(norm(x[..., :3]), whole[..., :3])
    give(norm, None)
    assert not torch.allclose(norm(x[..., :3]), whole[..., :3], atol=0.1)


def test_the_encoder_gives_two_maps_and_their_statistics() -> None:
    found = PerceptionEncoder()(image())
    assert [tuple(found[name].shape) for name in ("style_near", "style_far", "style_code")] == [
        (2, NEAR, 8, 8),
        (2, FAR, 4, 4),
        (2, CODE),
    ]


def test_the_code_is_not_normalised_away() -> None:
    """Instance normalisation makes every picture's statistics the same; the code is taken before it."""
    torch.manual_seed(0)
    encoder = PerceptionEncoder()
    dark, bright = (encoder(0.2 + scale * 0.1 * image(1))["style_code"] for scale in (1, 5))
    assert (dark - bright).abs().mean() > 0.01


def test_style_code_by_hand() -> None:
    near = torch.zeros(1, NEAR, 1, 2)
    near[0, 0] = torch.tensor([1.0, 3.0])
    code = style_code(near, torch.ones(1, FAR, 1, 1))
    assert code.shape == (1, CODE)
    torch.testing.assert_close(code[0, [0, NEAR]], torch.tensor([2.0, 1.0]), atol=1e-4, rtol=1e-4)
    assert code[0, 2 * NEAR].item() == 1


def test_vggs_features_have_the_encoders_shapes() -> None:
    found = vgg_style({"relu3_1": maps(2, 256, 16), "relu4_1": maps(2, 512, 8)})
    assert [tuple(value.shape) for value in found.values()] == [(2, NEAR, 8, 8), (2, FAR, 4, 4), (2, CODE)]


def test_attention_takes_from_where_the_painting_matches() -> None:
    """Every place of a painting of one kind alone gives the same value, whatever asks."""
    torch.manual_seed(0)
    attention, x = CrossAttention(16), maps(1, 16, 4)
    features = {"style_near": torch.ones(1, NEAR, 2, 2), "style_far": torch.ones(1, FAR, 1, 1)}
    with torch.no_grad():
        for value in attention.values:  # both scales say the same
            value.weight.zero_()
            value.bias.copy_(attention.values[0].bias)
        wanted = attention.output(attention.values[0].bias.view(1, -1, 1, 1))
        torch.testing.assert_close(attention(x, features) - attention.norm(x), wanted.expand(1, 16, 4, 4))


def test_places_of_the_content_are_independent_in_attention() -> None:
    torch.manual_seed(0)
    attention, x = CrossAttention(16), maps(1, 16, 4)
    features = {"style_near": maps(1, NEAR, 2), "style_far": maps(1, FAR, 1)}
    give(attention, None, notes=True)
    whole = attention(x, features)
    statistics = {name: seen for name, seen in look(attention).items() if name == "norm"}
    give(attention, statistics)
    torch.testing.assert_close(attention(x[..., 1:3, :], features), whole[..., 1:3, :], atol=1e-4, rtol=1e-4)


def test_mixed_is_an_average_of_paintings() -> None:
    values = torch.tensor([[1.0], [2.0], [10.0], [20.0]])  # two paintings for each of two contents
    assert mixed(values, {"mix": torch.tensor([0.75, 0.25])}).flatten().tolist() == [3.25, 6.5]
    assert mixed(values, {}) is values


def test_mixing_one_painting_with_itself_changes_nothing() -> None:
    torch.manual_seed(0)
    scin, attention = trained(), CrossAttention(8)
    one = {**styled(1), "style_near": maps(1, NEAR, 2), "style_far": maps(1, FAR, 1)}
    twice = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in one.items()}
    twice["mix"] = torch.tensor([0.3, 0.7])
    x = maps(1)
    torch.testing.assert_close(scin(x, twice), scin(x, one), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(x, twice), attention(x, one), atol=1e-5, rtol=1e-5)
