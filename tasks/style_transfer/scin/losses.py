"""Losses of style transfer: style, content, identity, adversarial, contrastive (ICL)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from engine.learning.recompute import recomputes
from engine.utilities.console import print_once
from tasks.style_transfer.clip import CLIPFeatures
from tasks.style_transfer.scin.config import LossConfig
from tasks.style_transfer.scin.instance import instance_statistics
from tasks.style_transfer.vgg import VGG

Styles = list[tuple[Tensor, Tensor]]
"""Mean and deviation for each layer, both (N, C, 1, 1)."""
Contents = list[Tensor]
"""Normalised maps (N, C, H, W) for each layer."""
TINY = 1e-8
SCALES = 3
"""Number of discriminators, each at half the resolution of the one before."""
EMBEDDING = 128
PARTS = 4
"""Where a block recomputes its activations, VGG processes the pictures in at least this many parts."""


class Perception(nn.Module):
    """How far pictures are from contents and styles, measured by a frozen VGG.

    Style is the mean and deviation of every channel, content the normalised features (Huang and Belongie 2017). Our
    choice: each layer's distance is divided by the mean square of what the painting, or the content, has there. So
    neither the scale of VGG's weights nor a single layer dominates, and a picture with no style and no content has a
    loss of about 1 per layer.
    """

    def __init__(self, vgg: VGG, config: LossConfig) -> None:
        super().__init__()
        self.vgg = vgg
        self.style_layers, self.content_layers = tuple(config.style_layers), tuple(config.content_layers)
        self.parts = config.parts

    @torch.no_grad()
    def styles(self, paintings: Tensor) -> Styles:
        """Style of paintings (N, 3, H, W)."""
        features = self.vgg(paintings)
        return [instance_statistics(features[name]) for name in self.style_layers]

    @torch.no_grad()
    def contents(self, photographs: Tensor) -> Contents:
        """Content of photographs (N, 3, H, W)."""
        features = self.vgg(photographs)
        return [_normal(features[name]) for name in self.content_layers]

    def compare(self, pictures: Tensor, styles: Styles, contents: Contents) -> tuple[Tensor, Tensor, Tensor]:
        """Style loss (N) and content loss (N) of pictures (N, 3, H, W), summed over layers, and the pictures' relu4_1,
        which is empty if VGG does not compute it.

        With ``loss.parts`` above 1, VGG's activations are alive for only one part of the pictures at a time.
        """
        style, content, deep = self._in_parts(self._compare, pictures, styles, contents)
        return style, content, deep

    def _compare(self, pictures: Tensor, styles: Styles, contents: Contents) -> tuple[Tensor, Tensor, Tensor]:
        features = self.vgg(pictures)
        style = [_style_distance(features[name], own) for name, own in zip(self.style_layers, styles, strict=True)]
        content = [
            (_normal(features[name]) - own).square().mean((1, 2, 3))
            for name, own in zip(self.content_layers, contents, strict=True)
        ]
        deep = features.get("relu4_1", pictures.new_zeros(len(pictures), 0))
        return torch.stack(style).sum(0), torch.stack(content).sum(0), deep

    def identity(self, pictures: Tensor, images: Tensor) -> Tensor:
        """Distance (N) between the plain features of pictures and images, summed over layers."""
        (distance,) = self._in_parts(self._identity, pictures, images)
        return distance

    def _identity(self, pictures: Tensor, images: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            wanted = self.vgg(images)
        features, found = self.vgg(pictures), []
        for name in sorted({*self.style_layers, *self.content_layers}):
            truth = wanted[name].float()
            distance = (features[name].float() - truth).square().mean((1, 2, 3))
            found.append(distance / (truth.square().mean((1, 2, 3)) + TINY))
        return (torch.stack(found).sum(0),)

    def _in_parts(
        self, function: Callable[..., tuple[Tensor, ...]], pictures: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        """Apply ``function`` to pictures and what belongs to each, part by part; backward recomputes each part."""
        parts = max(self.parts, PARTS if recomputes() else 1)
        if parts == 1 or not torch.is_grad_enabled():
            return function(pictures, *others)
        size, found = -(-len(pictures) // parts), []
        for start in range(0, len(pictures), size):
            part = pytree.tree_map_only(Tensor, operator.itemgetter(slice(start, start + size)), (pictures, *others))
            found.append(checkpoint(function, *part, use_reentrant=False))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @torch.no_grad()
    def measure(self, pictures: Tensor, contents: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
        """Style and content loss of each picture (N, 3, H, W)."""
        style, content, _ = self.compare(pictures, self.styles(styles), self.contents(contents))
        return style, content


def _style_distance(x: Tensor, style: tuple[Tensor, Tensor]) -> Tensor:
    mean, deviation = instance_statistics(x)
    wanted_mean, wanted_deviation = style
    distance = (mean - wanted_mean).square() + (deviation - wanted_deviation).square()
    size = wanted_mean.square() + wanted_deviation.square()
    return distance.mean((1, 2, 3)) / (size.mean((1, 2, 3)) + TINY)


def _normal(x: Tensor) -> Tensor:
    mean, deviation = instance_statistics(x)
    return torch.addcmul(-mean / deviation, x.float(), 1 / deviation)


class Discriminator(nn.Module):
    """Judges whether patches are from paintings, by 4x4 convolutions of stride 2 (PatchGAN, Isola et al. 2017)."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1),
            nn.InstanceNorm2d(2 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 4 * channels, 3, 1, 1),
            nn.InstanceNorm2d(4 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * channels, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images * 2 - 1).float()
        return scores


class Adversary(nn.Module):
    """Discriminators at several scales with a least-squares loss (LSGAN, Mao et al. 2017, arXiv 1611.04076).

    The network and the discriminators learn from one sum in one backward pass. The network's loss passes through the
    discriminators with their weights frozen, and the discriminators' loss sees detached pictures. So neither leaves a
    gradient in the other, and the block's single optimizer serves both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(Discriminator() for _ in range(SCALES))

    def for_network(self, pictures: Tensor) -> Tensor:
        """How far pictures are from passing for paintings, the network's loss; discriminators get no gradient."""
        losses = []
        for number, discriminator in enumerate(self.discriminators):
            discriminator.requires_grad_(False)
            scores = discriminator(_halved(pictures, number))
            discriminator.requires_grad_(True)
            losses.append((scores - 1).square().mean())
        return torch.stack(losses).mean()

    def for_itself(self, pictures: Tensor, paintings: Tensor) -> Tensor:
        """How badly pictures and paintings are told apart, the discriminators' loss; the network gets no gradient."""
        losses = []
        for number, discriminator in enumerate(self.discriminators):
            of_pictures = discriminator(_halved(pictures.detach(), number))
            of_paintings = discriminator(_halved(paintings, number))
            losses.append(of_pictures.square().mean() + (of_paintings - 1).square().mean())
        return torch.stack(losses).mean()


def _halved(images: Tensor, times: int) -> Tensor:
    return F.avg_pool2d(images, 2**times) if times else images


class VGGFeatures(nn.Module):
    """Features of the frozen VGG instead of CLIP (our choice): statistics and coarse layout of relu4_1."""

    width = 6 * 512

    def forward(self, pictures: Tensor, deep: Tensor) -> Tensor:
        """Embeddings (N, width) computed from ``deep``, the pictures' relu4_1."""
        x = deep.float()
        parts = [*instance_statistics(x), F.adaptive_avg_pool2d(x, 2)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class Contrast(nn.Module):
    """Instance-based contrastive learning on stylised pictures (arXiv 2404.13584).

    From the paper: a frozen image encoder, a trainable projection and InfoNCE, where pictures that share their content
    or their painting are positives, and pictures that share neither are negatives. Our choices: the temperature, the
    form of the projection, and the features that stand in for CLIP.

    Args:
        temperature: the smaller it is, the more the nearest negatives count.
    """

    def __init__(self, encoder: nn.Module, width: int, temperature: float) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.projection = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, EMBEDDING)
        )

    def forward(self, pictures: Tensor, deep: Tensor, contents: Tensor, styles: Tensor) -> Tensor:
        """The loss for pictures (N, 3, H, W), their relu4_1 from VGG, and the numbers (N) of the content and of the
        painting that each picture was made from."""
        embeddings = self.projection(self.encoder(pictures, deep))
        return info_nce(embeddings, contents, styles, self.temperature)


def info_nce(embeddings: Tensor, contents: Tensor, styles: Tensor, temperature: float) -> Tensor:
    """InfoNCE with several positives: each pair of an anchor and a positive against all negatives of the anchor.

    Args:
        embeddings: (N, d); only their directions count.
        contents, styles: numbers (N); two pictures that share either number are positives, others are negatives.

    Example:
        >>> z = torch.eye(2).repeat(2, 1)  # pictures 0 and 2 alike, 1 and 3 alike
        >>> loss = info_nce(z, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1]), 1.0)
        >>> round(loss.item(), 4)  # log(1 + 2 exp(0) / exp(1))
        0.5514
    """
    z = F.normalize(embeddings.float(), dim=1)
    similarity = z @ z.T / temperature
    shared = (contents[:, None] == contents) | (styles[:, None] == styles)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive, negative = shared & ~itself, ~shared
    against = similarity.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    losses = torch.logaddexp(similarity, against) - similarity
    return (losses * positive).sum() / positive.sum()


class LocalLoss(nn.Module):
    """The loss of every block but the last: style and content of the auxiliary network's image, at its resolution.

    It is called with the image (N, 3, h, w) and the targets that ``pictures_of`` makes.
    """

    def __init__(self, perception: Perception, config: LossConfig) -> None:
        super().__init__()
        self.perception, self.config = perception, config

    def forward(self, image: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        size = image.shape[2], image.shape[3]
        content, style, identity = (_brought(targets[name], size) for name in ("content", "style", "identity"))
        contents, styles = self.perception.contents(content), self.perception.styles(style)
        contents, styles = shifted(contents), doubled(styles)
        if len(identity):
            contents = [torch.cat(pair) for pair in zip(contents, self.perception.contents(identity), strict=True)]
            own = self.perception.styles(identity)
            styles = [_joined(*pair) for pair in zip(styles, own, strict=True)]
        style_loss, content_loss, _ = self.perception.compare(image, styles, contents)
        return (self.config.style * style_loss + self.config.content * content_loss).mean()


class NetworkLoss(nn.Module):
    """All losses of the network's own pictures.

    L = l1 style + l2 content + l3 identity + l4 adversarial + l5 contrastive (arXiv 2404.13584). The paper does not
    give the weights. Ours are taken from the same laboratory's earlier work, whose losses were scaled in another way.

    It is called with the pictures (2 P + 2 I, 3, H, W) and the targets that ``pictures_of`` makes.
    """

    def __init__(self, perception: Perception, config: LossConfig) -> None:
        super().__init__()
        self.perception, self.config = perception, config
        self.adversary = Adversary() if config.adversarial else None
        self.contrast: Contrast | None = None
        if config.contrastive:
            encoder = CLIPFeatures(config.clip) if config.clip else VGGFeatures()
            self.contrast = Contrast(encoder, encoder.width, config.temperature)
            _say(f"CLIP, {config.clip}" if config.clip else "the frozen VGG (loss.clip names no CLIP)")

    def forward(self, pictures: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        parts = self.parts(pictures, targets)
        if "discriminators" in parts:  # their loss says nothing about the pictures: keep its gradient, count it as 0
            parts["discriminators"] = parts["discriminators"] - parts["discriminators"].detach()
        return torch.stack(list(parts.values())).sum()

    def parts(self, pictures: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each loss by name, weighted."""
        config, perception = self.config, self.perception
        content, style, identity = (targets[name] for name in ("content", "style", "identity"))
        pairs = len(content)
        stylised, of_identity = pictures[: 2 * pairs], pictures[2 * pairs :]
        styles, contents = doubled(perception.styles(style)), shifted(perception.contents(content))
        style_loss, content_loss, deep = perception.compare(stylised, styles, contents)
        found = {"style": config.style * style_loss.mean(), "content": config.content * content_loss.mean()}
        if len(identity):
            found["identity"] = config.identity * F.mse_loss(of_identity, identity)
            distance = perception.identity(of_identity, identity)
            found["identity_features"] = config.identity_features * distance.mean()
        if self.adversary is not None:
            found["adversarial"] = config.adversarial * self.adversary.for_network(stylised)
            found["discriminators"] = self.adversary.for_itself(stylised, style)
        if self.contrast is not None:
            numbers = torch.arange(pairs, device=pictures.device)
            of_content, of_style = torch.cat([numbers, numbers.roll(-1)]), numbers.repeat(2)
            contrast = self.contrast(stylised, deep, of_content, of_style)
            found["contrastive"] = config.contrastive * contrast
        return found


@functools.cache
def _say(features: str) -> None:
    """Print the features once, however many networks estimates and plans build."""
    print_once(f"contrastive loss on features of {features}")


def pictures_of(contents: Tensor, styles: Tensor, identities: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A message's features and targets for P photographs and P paintings, both (P, 3, H, W).

    Every painting is used for its own photograph and for the next one (after the last comes the first), so that every
    photograph and every painting has two pictures. At the end come the photographs and paintings of ``identities``
    pairs, each in its own style::

        x:      c0 c1 ... c(P-1)   c1 c2 ... c0    c0 .. s0 ..
        style:  s0 s1 ... s(P-1)   s0 s1 ... s(P-1)    c0 .. s0 ..
    """
    identity = torch.cat([contents[:identities], styles[:identities]])
    features = {
        "x": torch.cat([contents, contents.roll(-1, 0), identity]),
        "style": torch.cat([styles, styles, identity]),
    }
    return features, {"content": contents, "style": styles, "identity": identity}


def shifted(contents: Contents) -> Contents:
    """Contents of all pictures: those of the photographs, then those of the next photographs."""
    return [torch.cat([maps, maps.roll(-1, 0)]) for maps in contents]


def doubled(styles: Styles) -> Styles:
    """Styles of all pictures: those of the paintings, twice."""
    return [_joined(each, each) for each in styles]


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return mean, deviation


def _brought(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images reduced to ``size``, which must divide theirs, by averaging."""
    return F.adaptive_avg_pool2d(images, size) if tuple(images.shape[2:]) != size and len(images) else images
