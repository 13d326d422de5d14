"""The losses: by hand, and who gets which gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.learning.recompute import recomputing
from tasks.style_transfer.scin.losses import (
    Adversary,
    CLIPFeatures,
    Contrast,
    LocalLoss,
    NetworkLoss,
    Perception,
    VGGFeatures,
    _say,
    info_nce,
    pictures_of,
)
from tasks.style_transfer.vgg import VGG
from tests.tasks.style_transfer.scin.networks import VGG16, loss


def images(n: int, seed: int = 0, side: int = 32) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def perception() -> Perception:
    torch.manual_seed(0)
    return Perception(VGG(VGG16, ["relu1_1", "relu2_1", "relu3_1", "relu4_1"], saved=False), loss())


def numbers(pairs: int) -> tuple[Tensor, Tensor]:
    """Contents and styles of the pictures that ``pictures_of`` makes."""
    every = torch.arange(pairs)
    return torch.cat([every, every.roll(-1)]), every.repeat(2)


# ICL: three pairs make six pictures; picture 0 is (c0, s0).
#   pictures   0: c0 s0   1: c1 s1   2: c2 s2   3: c1 s0   4: c2 s1   5: c0 s2
def test_positives_share_content_or_painting_and_negatives_neither() -> None:
    """Moving picture 0 towards another lowers the loss if that is a positive, and raises it if a negative."""
    contents, styles = numbers(3)
    assert [(c, s) for c, s in zip(contents.tolist(), styles.tolist(), strict=True)] == [
        (0, 0), (1, 1), (2, 2), (1, 0), (2, 1), (0, 2),
    ]  # fmt: skip
    similarity = torch.zeros(6, 6, requires_grad=True)
    shared = (contents[:, None] == contents) | (styles[:, None] == styles)
    assert shared[0].nonzero().flatten().tolist() == [0, 3, 5]
    z = torch.eye(6)
    for other, falls in ((1, False), (2, False), (3, True), (4, False), (5, True)):
        nearer = z.clone()
        nearer[0] = z[0] + 0.1 * z[other]
        change = info_nce(nearer, contents, styles, 0.2) - info_nce(z, contents, styles, 0.2)
        assert (change < 0) == falls, other
    assert similarity.grad is None


def test_info_nce_of_orthogonal_embeddings_by_hand() -> None:
    """All similarities 0: each positive stands against three negatives, log(1 + 3)."""
    assert info_nce(torch.eye(6), *numbers(3), 0.2).item() == pytest.approx(math.log(4), rel=1e-5)


def test_info_nce_of_random_embeddings_is_near_that_of_orthogonal_ones() -> None:
    torch.manual_seed(0)
    found = torch.stack([info_nce(torch.randn(6, 512), *numbers(3), 1.0) for _ in range(50)]).mean()
    assert found.item() == pytest.approx(math.log(4), abs=0.01)


def test_info_nce_of_perfect_embeddings() -> None:
    """Two pairs: 0: c0 s0, 1: c1 s1, 2: c1 s0, 3: c0 s1. Positives alike, negatives opposite cannot all be; by hand."""
    contents, styles = numbers(2)
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # negatives opposite, positives orthogonal
    assert info_nce(z, contents, styles, 0.2).item() == pytest.approx(math.log(1 + math.exp(-5)), rel=1e-4)


def test_info_nce_does_not_overflow() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    found = info_nce(z, *numbers(2), 1e-3)
    assert math.isfinite(found.item())
    assert found.item() == pytest.approx(2000, rel=1e-3)


def test_rows_of_a_batch_are_what_the_losses_take_them_for() -> None:
    contents, styles = images(3), images(3, seed=1)
    features, targets = pictures_of(contents, styles, 2)
    assert features["x"].shape[0] == features["style"].shape[0] == 3 + 3 + 4
    of_content, of_style = numbers(3)
    assert torch.equal(features["x"][:6], contents[of_content])
    assert torch.equal(features["style"][:6], styles[of_style])
    assert torch.equal(features["x"][6:], features["style"][6:])
    assert torch.equal(targets["identity"], torch.cat([contents[:2], styles[:2]]))


def test_losses_of_perfect_pictures_are_zero() -> None:
    """Contents that are their paintings: each picture is to be itself."""
    pair = images(1).repeat(2, 1, 1, 1)
    _, targets = pictures_of(pair, pair, 1)
    criterion = NetworkLoss(perception(), loss(adversarial=0.0, contrastive=0.0))
    parts = criterion.parts(pair[:1].repeat(6, 1, 1, 1), targets)
    assert set(parts) == {"style", "content", "identity", "identity_features"}
    for name, value in parts.items():
        assert value.item() == pytest.approx(0, abs=1e-6), name


@pytest.mark.parametrize("name", ["identity", "identity_features"])
def test_identity_losses_see_identities_alone(name: str) -> None:
    contents, styles = images(2), images(2, seed=1)
    features, targets = pictures_of(contents, styles, 1)
    criterion = NetworkLoss(perception(), loss(adversarial=0.0, contrastive=0.0))
    pictures = features["x"].clone()
    pictures[:4] = images(4, seed=9)
    assert criterion.parts(pictures, targets)[name].item() == 0
    pictures[5] += 0.1
    wanted = 50 * 0.1**2 / 2 if name == "identity" else None  # one of two identities is off by 0.1
    found = criterion.parts(pictures, targets)[name].item()
    assert found > 0
    if wanted is not None:
        assert found == pytest.approx(wanted, rel=1e-4)


def test_style_loss_does_not_see_where_things_are_and_content_loss_does() -> None:
    """Rolling by whole 8-pixel cells, away from the edges' padding, moves features without changing them much."""
    seen, one = perception(), images(1, side=64)
    rolled = one.roll(32, 3)
    style, content = seen.measure(rolled, one, one)
    other_style, other_content = seen.measure(images(1, seed=5, side=64) ** 3, one, one)
    assert style.item() < 0.1 * other_style.item()
    assert content.item() > 0.3 * other_content.item()


def test_losses_do_not_depend_on_vggs_scale() -> None:
    seen, one, other = perception(), images(2), images(2, seed=3)
    before = seen.measure(one, other, other)
    first = seen.vgg.get_submodule("relu1_1")
    first.weight.mul_(4)  # ReLU lets a factor through every layer, whose biases are 0 here
    for have, want in zip(seen.measure(one, other, other), before, strict=True):
        torch.testing.assert_close(have, want, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("parts", "recompute"),
    [
        pytest.param(1, True, marks=pytest.mark.slow),
        (4, False),
        pytest.param(7, True, marks=pytest.mark.slow),
        pytest.param(20, False, marks=pytest.mark.slow),
    ],
)
def test_parts_that_are_recomputed_give_the_same_losses_and_gradients(parts: int, recompute: bool) -> None:
    """Ten pictures, in parts of three, three, three and one, or two each, or one each.

    In double precision: convolutions of other numbers of pictures are rounded otherwise, and a ReLU at 0 lets a
    gradient through or not.
    """
    seen, contents, styles = perception().double(), images(10, 1).double(), images(10, 2).double()
    found = []
    for divided in (False, True):
        seen.parts = parts if divided else 1
        with recomputing(recompute and divided):
            pictures = images(10).double().requires_grad_()
            style, content, deep = seen.compare(pictures, seen.styles(styles), seen.contents(contents))
            total = style.sum() + content.sum() + deep.square().mean() + seen.identity(pictures, contents).sum()
            total.backward()
        found.append((style.detach(), content.detach(), deep.detach(), pictures.grad))
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-3, atol=3e-5)


def test_a_picture_of_nothing_has_a_style_loss_of_about_one_a_layer() -> None:
    seen = perception()
    styles = seen.styles(images(1))
    for layer in seen.vgg.children():
        layer.weight.zero_()
    style, _, _ = seen.compare(images(1), styles, seen.contents(images(1)))
    assert style.item() == pytest.approx(4, rel=0.01)


def test_the_adversarial_step_leaves_the_networks_gradients_alone() -> None:
    adversary, pictures = Adversary(), images(2).requires_grad_()
    adversary.for_itself(pictures, images(2, seed=1)).backward()
    assert pictures.grad is None
    assert all(parameter.grad is not None for parameter in adversary.parameters())


def test_the_networks_step_leaves_the_discriminators_gradients_alone() -> None:
    adversary, pictures = Adversary(), images(2).requires_grad_()
    adversary.for_network(pictures).backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())


def test_both_together_give_each_what_it_gets_alone() -> None:
    torch.manual_seed(0)
    adversary, paintings = Adversary(), images(2, seed=1)

    def gradients(network: bool, itself: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        adversary.zero_grad()
        pictures = images(2).requires_grad_()
        parts = [adversary.for_network(pictures)] if network else []
        parts += [adversary.for_itself(pictures, paintings)] if itself else []
        torch.stack(parts).sum().backward()
        return pictures.grad, [parameter.grad for parameter in adversary.parameters()]

    both, alone, own = gradients(True, True), gradients(True, False), gradients(False, True)
    assert torch.equal(both[0], alone[0])
    for have, want in zip(both[1], own[1], strict=True):
        assert torch.equal(have, want)


def test_least_squares_by_hand() -> None:
    """Discriminators that always say 0.25: (0.25 - 1)^2 for the network; 0.25^2 + (0.25 - 1)^2 for themselves."""
    adversary = Adversary()
    for discriminator in adversary.discriminators:
        torch.nn.init.zeros_(discriminator.layers[-1].weight)
        torch.nn.init.constant_(discriminator.layers[-1].bias, 0.25)
    assert adversary.for_network(images(2)).item() == pytest.approx(0.5625)
    assert adversary.for_itself(images(2), images(2)).item() == pytest.approx(0.0625 + 0.5625)


def test_gradients_of_all_losses_reach_pictures_projection_and_discriminators_but_not_vgg() -> None:
    criterion = NetworkLoss(perception(), loss())
    features, targets = pictures_of(images(2), images(2, seed=1), 1)
    pictures = (0.5 * features["x"]).requires_grad_()
    criterion(pictures, targets).backward()
    assert (pictures.grad.flatten(1).abs().sum(1) > 0).all()
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None, name
    assert {name.split(".")[0] for name, _ in criterion.named_parameters()} == {"adversary", "contrast"}
    assert not [name for name in criterion.state_dict() if "vgg" in name]


def test_projection_learns_to_tell_pairs() -> None:
    """Contrast on fixed pictures of three contents in three styles falls well below chance."""
    torch.manual_seed(0)
    seen = perception()
    contrast = Contrast(VGGFeatures(), VGGFeatures.width, 0.2)
    base, tint = images(3), images(3, seed=7)[:, :, :1, :1]
    of_content, of_style = numbers(3)
    pictures = (base[of_content] * tint[of_style]).clamp(0, 1)
    deep = seen.vgg(pictures)["relu4_1"]
    optimizer = torch.optim.Adam(contrast.projection.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = contrast(pictures, deep, of_content, of_style)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("identities", [0, 1])
def test_local_loss_is_that_of_the_auxiliary_networks_resolution(identities: int) -> None:
    seen = perception()
    contents, styles = images(2, side=64), images(2, seed=1, side=64)
    features, targets = pictures_of(contents, styles, identities)
    criterion = LocalLoss(seen, loss(style=2.0, content=3.0))

    def small(full: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(full, 2)

    image = small(images(4 + 2 * identities, seed=4, side=64))
    style, content = seen.measure(image, small(features["x"]), small(features["style"]))
    assert criterion(image, targets).item() == pytest.approx((2 * style + 3 * content).mean().item(), rel=1e-4)


def test_clip_is_frozen_not_saved_and_lets_gradients_through(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config)
    model.save_pretrained(tmp_path / "clip")
    clip = CLIPFeatures(str(tmp_path / "clip"))
    assert not list(clip.parameters())
    assert not clip.state_dict()
    pictures = images(2, side=48).requires_grad_()
    found = clip(pictures, pictures)
    assert found.shape == (2, 16)
    found.square().sum().backward()
    assert pictures.grad.abs().sum() > 0
    # What transformers' own processor makes of an image of the right size.
    mean, deviation = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    exact = images(1)
    wanted = model.eval()(pixel_values=(exact - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)).image_embeds
    torch.testing.assert_close(clip(exact, exact), wanted, rtol=1e-4, atol=1e-5)


def test_a_clip_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"^loss.clip: no CLIP model can be loaded from .*nowhere") as error:
        CLIPFeatures(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_the_reported_loss_is_that_of_the_pictures() -> None:
    """The discriminators learn by it, but their own loss counts as 0."""
    criterion = NetworkLoss(perception(), loss())
    features, targets = pictures_of(images(2), images(2, seed=1), 1)
    parts = criterion.parts(0.5 * features["x"], targets)
    wanted = sum(value for name, value in parts.items() if name != "discriminators")
    torch.testing.assert_close(criterion(0.5 * features["x"], targets), wanted)


def test_the_log_says_whose_features_the_contrast_sees(capsys: Any) -> None:
    _say.cache_clear()
    NetworkLoss(perception(), loss())
    assert "the frozen VGG (loss.clip names no CLIP)" in capsys.readouterr().out
    NetworkLoss(perception(), loss(contrastive=0.0))
    assert not capsys.readouterr().out
