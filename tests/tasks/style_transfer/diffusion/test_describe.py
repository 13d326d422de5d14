"""Every word by a picture made by hand."""

from __future__ import annotations

import colorsys
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.style_transfer.diffusion.describe import HUES, describe
from tasks.style_transfer.diffusion.tokenizer import WORDS

SIDE = 64
LIGHT, COLOUR = ("dark", "dim", "", "bright"), ("grey", "pale", "", "vivid")
CONTRAST, TEXTURE = ("flat", "", "contrasting"), ("smooth", "", "rough")


def flat(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1).expand(3, SIDE, SIDE)


def halves(apart: float) -> Tensor:
    """Grey, one half so much darker than the other: a deviation of half of that, and next to no steps."""
    picture = torch.full((3, SIDE, SIDE), 0.5 - apart / 2)
    picture[..., SIDE // 2 :] += apart
    return picture


def stripes(apart: float) -> Tensor:
    """Grey columns that take turns: a step of so much everywhere, a deviation of half of that."""
    picture = torch.full((3, SIDE, SIDE), 0.5 - apart / 2)
    picture[..., ::2] += apart
    return picture


def words(light: str = "", colour: str = "grey", hue: str = "", contrast: str = "flat", texture: str = "smooth") -> str:
    return " ".join(word for word in (light, colour, hue, contrast, texture) if word)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0, "dark"),
        (0.29, "dark"),
        (0.31, "dim"),
        (0.41, "dim"),
        (0.43, ""),
        (0.59, ""),
        (0.61, "bright"),
        (1, "bright"),
    ],
)
def test_light(value: float, word: str) -> None:
    assert describe(flat(value, value, value)) == words(light=word)


def test_light_is_luminance() -> None:
    """Green counts for more than blue."""
    assert describe(flat(0.1, 0.8, 0.1)) == "vivid green flat smooth"
    assert describe(flat(0.1, 0.1, 0.8)) == "dark vivid blue flat smooth"


@pytest.mark.parametrize(
    ("chroma", "word"),
    [(0.03, "grey"), (0.07, "grey"), (0.09, "pale"), (0.17, "pale"), (0.19, ""), (0.29, ""), (0.31, "vivid")],
)
def test_colour(chroma: float, word: str) -> None:
    """Above a saturation of 0.08 there is a hue."""
    assert describe(flat(0.5, 0.5, 0.5 - chroma)) == words(colour=word, hue="yellow" if chroma / 0.5 > 0.08 else "")


def test_colours_that_cancel_out_are_vivid_and_of_no_hue() -> None:
    picture = flat(0.9, 0.2, 0.2).clone()
    picture[:, ::2] = torch.tensor([0.2, 0.9, 0.9]).view(3, 1, 1)
    assert describe(picture) == "vivid rough"


@pytest.mark.parametrize(
    ("colour", "hue"),
    [
        ((1, 0, 0), "red"),
        ((1, 0.5, 0), "orange"),
        ((1, 1, 0), "yellow"),
        ((0, 1, 0), "green"),
        ((0, 1, 1), "cyan"),
        ((0, 0, 1), "blue"),
        ((0.5, 0, 1), "violet"),
        ((1, 0, 0.7), "pink"),
        ((1, 0, 0.02), "red"),
    ],
)
def test_hues(colour: tuple[float, float, float], hue: str) -> None:
    assert describe(flat(*colour)).split()[-3:] == [hue, "flat", "smooth"]


def test_once_around_the_circle_every_hue_comes_once_and_red_again() -> None:
    seen = [describe(flat(*colorsys.hsv_to_rgb(degree / 360, 1, 1))).split()[-3] for degree in range(360)]
    assert [hue for hue, _ in itertools.groupby(seen)] == [*HUES, "red"]
    assert min(seen.count(hue) for hue in HUES) > 20


@pytest.mark.parametrize(
    ("apart", "contrast"),
    [(0.1, "flat"), (0.23, "flat"), (0.25, ""), (0.47, ""), (0.49, "contrasting"), (1, "contrasting")],
)
def test_contrast(apart: float, contrast: str) -> None:
    assert describe(halves(apart)) == words(contrast=contrast)


@pytest.mark.parametrize(
    ("apart", "contrast", "texture"),
    [
        (0.06, "flat", "smooth"),
        (0.08, "flat", ""),
        (0.12, "flat", ""),
        (0.14, "flat", "rough"),
        (0.3, "", "rough"),
        (0.6, "contrasting", "rough"),
    ],
)
def test_texture(apart: float, contrast: str, texture: str) -> None:
    for picture in (stripes(apart), stripes(apart).transpose(1, 2)):
        assert describe(picture) == words(contrast=contrast, texture=texture)


def test_steps_across_and_down_are_added() -> None:
    """Each is 0.04: neither alone is more than smooth."""
    rows, columns = torch.meshgrid(torch.arange(SIDE) % 2, torch.arange(SIDE) % 2, indexing="ij")
    for both, texture in ((False, "smooth"), (True, "")):
        picture = 0.5 + 0.04 * (columns + (rows if both else 0))
        assert describe(picture.expand(3, -1, -1)) == words(texture=texture)


def test_nothing_but_words_of_the_tokenizer_comes_out() -> None:
    """Of many pictures; and every word comes."""
    known = {word for word in (*LIGHT, *COLOUR, *HUES, *CONTRAST, *TEXTURE) if word}
    assert known <= set(WORDS)
    seen, generator = set[str](), torch.Generator().manual_seed(0)
    for number in range(600):
        colour, spread, low = (torch.rand(size, generator=generator) for size in ((3, 1, 1), (), (1,)))
        grain = torch.rand(1, 1, 1 + number % 9, 1 + number % 7, generator=generator) - 0.5
        seen |= set(describe((colour * low + spread * F.interpolate(grain, (16, 16))[0]).clamp(0, 1)).split())
    assert seen == known


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1)])
def test_the_smallest_pictures(height: int, width: int) -> None:
    assert describe(torch.full((3, height, width), 0.7)) == words(light="bright")
