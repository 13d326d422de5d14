"""Whole and in tiles, of every size."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.style_transfer.colour import keep_colour
from tasks.style_transfer.images import as_pixels, as_tensor
from tasks.style_transfer.stylize import paint_whole, stylize
from tests.tasks.style_transfer.painters import Blind, Copying, Normalising, OfArtists, noise, painting, slope

SIZES = [(1, 1), (1, 50), (50, 1), (17, 33), (16, 16), (31, 32), (33, 32), (64, 96), (45, 101)]


def apart(one: Any, other: Any) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", [1, 8, 16, 24])
@pytest.mark.parametrize("overlap", [0, 5])
def test_every_pixel_of_every_size_comes_back_to_its_place(size: tuple[int, int], multiple: int, overlap: int) -> None:
    content = noise(*size)
    before = content.copy()
    found = stylize(Copying(multiple), content, painting(), tile=32, overlap=overlap)
    assert found.dtype == np.uint8
    assert (found == before).all()
    assert (content == before).all()
    assert not np.shares_memory(found, content)


def test_tiles_have_the_look_of_the_whole_and_no_seams() -> None:
    content, style = slope(90, 130), painting()
    whole = stylize(Normalising(), content, style, tile=130)
    assert whole.std() > 20, "there is something to see"
    tiled = stylize(Normalising(), content, style, tile=32, overlap=8)
    assert apart(tiled, whole) <= 3

    def seam(image: Any) -> int:
        """Largest step from a tile to the next."""
        rows, columns = image[31:90:32], image[:, 31:130:32]
        return max(apart(rows[:2], image[32:90:32]), apart(columns[:, :4], image[:, 32:130:32]))

    assert seam(tiled) <= seam(whole) + 1
    blind = stylize(Blind(), content, style, tile=32, overlap=8)
    assert apart(blind, whole) > 50
    assert seam(blind) > seam(whole) + 50


def test_the_overlap_is_what_a_tile_sees_of_its_neighbours() -> None:
    content, style, painter = noise(70, 70), painting(), Normalising(1)
    with torch.no_grad():
        thumbnail = painter.look(as_tensor(content)[None], style, 1.0)
        whole = as_pixels(painter.paint(as_tensor(content)[None], style, 1.0, thumbnail)[0])
    painter.look = lambda *_: thumbnail  # type: ignore[method-assign]
    assert apart(stylize(painter, content, style, tile=32, overlap=2), whole) <= 1, "the blur reaches 2 pixels far"
    assert apart(stylize(painter, content, style, tile=32, overlap=1), whole) > 1


def test_no_more_than_a_tile_is_painted_at_a_time() -> None:
    painter = Normalising(16)
    stylize(painter, noise(200, 330), painting(), tile=64, overlap=16)
    assert max(max(sides) for sides in painter.seen) == 64 + 2 * 16
    assert painter.seen[0] == (48, 64), "the thumbnail, 39 x 64, filled up to multiples of 16"
    assert len(painter.seen) == 1 + 4 * 6


def test_what_fits_a_tile_is_painted_whole_and_not_looked_at() -> None:
    painter = Normalising(16)
    stylize(painter, noise(40, 64), painting(), tile=64, overlap=16)
    assert painter.seen == [(48, 64)]


def test_small_ones_are_continued_at_their_edges() -> None:
    seen: list[Tensor] = []

    class Looking(Copying):
        def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
            seen.append(content)
            return content

    stylize(Looking(1), noise(1, 1), painting())
    assert seen[0].shape == (1, 3, 16, 16)
    assert seen[0].equal(as_tensor(noise(1, 1)).expand(1, 3, 16, 16))


def test_alpha_is_handed_on() -> None:
    content, style = slope(32, 32), painting()
    full, half, none = (stylize(Normalising(), content, style, alpha=alpha) for alpha in (1.0, 0.5, 0.0))
    assert apart(half, (full.astype(int) + none) / 2) <= 1
    assert apart(none, content) <= 5, "but for the blur"
    assert apart(full, none) > 50


@pytest.mark.parametrize("tile", [32, 64])
def test_colour_is_kept_pixel_by_pixel(tile: int) -> None:
    content, style, painter = slope(45, 60), painting(), Normalising()
    plain = as_tensor(stylize(painter, content, style, tile=tile))
    kept = stylize(painter, content, style, tile=tile, keep_colour=True)
    assert apart(kept, as_pixels(keep_colour(plain, as_tensor(content)))) <= 1
    assert apart(kept, as_pixels(plain)) > 10


def test_half_precision_is_taken() -> None:
    class Halved(Copying):
        def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
            return content.bfloat16()

    for colour in (False, True):
        assert apart(stylize(Halved(), noise(20, 20), painting(), keep_colour=colour), noise(20, 20)) <= 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.5}, "alpha: 1.5 is not from 0 to 1"),
        ({"alpha": -0.1}, "alpha: -0.1 is not"),
        ({"alpha": float("nan")}, "alpha: nan is not"),
        ({"tile": 8}, "tile: 8 is too small; the least is 16"),
        ({"overlap": -1}, "overlap: -1 is too small; the least is 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    painter = Normalising()
    with pytest.raises(ValueError, match=said):
        stylize(painter, noise(20, 20), painting(), **options)
    assert not painter.seen


@pytest.mark.parametrize("sides", [(16, 24), (17, 9), (1, 1), (40, 33)])
@pytest.mark.parametrize("keep_colour", [False, True])
def test_artists_paint_wholes_of_any_size(sides: tuple[int, int], keep_colour: bool) -> None:
    content, painter, cpu = noise(*sides), OfArtists(["monet"]), torch.device("cpu")
    asked = {"name": "hill", "device": cpu, "seed": 3, "keep_colour": keep_colour}
    assert apart(paint_whole(painter, content, "monet", alpha=0.0, **asked), content) <= 1
    found = paint_whole(painter, content, "monet", alpha=1.0, **asked)
    assert found.shape == content.shape
    assert (found == paint_whole(painter, content, "monet", alpha=1.0, **asked)).all()
    assert len(painter.asked) == 3, "never in tiles"
    height, width = painter.asked[0][0]
    assert (height % 8, width % 8) == (0, 0)
    assert sides[0] <= height < max(sides[0], 16) + 8
