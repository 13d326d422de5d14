import pytest
import torch
from torch import Tensor, nn

from tasks.super_resolution.network import side_multiple
from tasks.tiles import enlarge, tiles
from tests.tasks.super_resolution.networks import image, small_network


@pytest.mark.parametrize(("height", "width", "side"), [(17, 33, 8), (16, 16, 16), (5, 7, 0), (9, 9, 100)])
def test_tiles_cover_an_image_once(height: int, width: int, side: int) -> None:
    seen = torch.zeros(height, width)
    for tile in tiles(height, width, side, 3):
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        top, bottom, left, right = tile.wide
        assert 0 <= top <= tile.top < tile.bottom <= bottom <= height
        assert 0 <= left <= tile.left < tile.right <= right <= width
    assert seen.eq(1).all()


def test_tiles_leave_no_seam_if_they_overlap_as_far_as_the_network_sees() -> None:
    # Six 3x3 convolutions before the upsampling, two behind it at twice the resolution.
    network = small_network("EDSR", num_block=2).eval()
    low = image(1, 3, 29, 41)
    with torch.no_grad():
        whole = network(low)
    tiled = enlarge(network, low, 2, side=12, overlap=8)
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert not torch.allclose(enlarge(network, low, 2, side=12, overlap=0), whole, atol=1e-3)


@pytest.mark.parametrize(("side", "overlap"), [(48, 40), (47, 40), (48, 41), (44, 40)])
@pytest.mark.parametrize("kind", ["RRDBNet", "SwinIR"])
def test_tiles_of_networks_with_windows_lie_as_in_the_whole(kind: str, side: int, overlap: int) -> None:
    network = small_network(kind, 2).eval()
    low = image(1, 3, 104, 136)
    with torch.no_grad():
        whole = network(low)
    tiled = enlarge(network, low, 2, side_multiple(network), side, overlap)
    assert torch.allclose(tiled, whole, atol=1e-3), "to what this far away still counts"


@pytest.mark.parametrize("size", [(16, 24), (17, 30), (3, 5)])
def test_sides_are_filled_up_to_the_multiple_and_cut_off_again(size: tuple[int, int]) -> None:
    seen = []

    def double(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return nn.functional.interpolate(x, scale_factor=2, mode="nearest")

    low = image(1, 3, *size)
    assert enlarge(double, low, 2, multiple=8).equal(nn.functional.interpolate(low, scale_factor=2, mode="nearest"))
    assert all(side % 8 == 0 for sides in seen for side in sides)
