import numpy as np
import torch

from tasks.style_transfer.images import Pixels, as_tensor
from tasks.style_transfer.sheet import GAP, contact_sheet

SIDE = 16


def flat(height: int, width: int, value: int) -> Pixels:
    return np.full((height, width, 3), value, np.uint8)


def square(sheet: Pixels, row: int, column: int) -> Pixels:
    top, left = row * (SIDE + GAP), column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def test_everything_is_in_its_place() -> None:
    contents, styles = [flat(16, 16, 10), flat(32, 32, 20)], [flat(8, 8, n) for n in (30, 40, 50)]
    pictures = {(0, 0): flat(16, 16, 60), (1, 2): flat(64, 64, 70)}
    sheet = contact_sheet(contents, styles, pictures, SIDE)
    assert sheet.shape == (3 * SIDE + 2 * GAP, 4 * SIDE + 3 * GAP, 3)
    assert sheet.dtype == np.uint8
    wanted = [[255, 30, 40, 50], [10, 60, 255, 255], [20, 255, 255, 70]]
    for row, values in enumerate(wanted):
        for column, value in enumerate(values):
            assert (square(sheet, row, column) == value).all(), (row, column)
    assert (sheet[:, SIDE : SIDE + GAP] == 255).all(), "gaps are white"
    assert (sheet[SIDE : SIDE + GAP] == 255).all()


def test_images_keep_their_shape_in_the_middle_of_their_square() -> None:
    sheet = contact_sheet([flat(20, 40, 0)], [flat(1, 1000, 0)], {(0, 0): flat(40, 10, 0)}, SIDE)

    def dark(row: int, column: int) -> tuple[slice, slice]:
        where = np.argwhere(square(sheet, row, column)[..., 0] == 0)
        (top, left), (bottom, right) = where.min(0), where.max(0) + 1
        assert len(where) == (bottom - top) * (right - left)
        return slice(top, bottom), slice(left, right)

    assert dark(1, 0) == (slice(4, 12), slice(0, 16))
    assert dark(0, 1) == (slice(7, 8), slice(0, 16)), "a line stays one pixel high"
    assert dark(1, 1) == (slice(0, 16), slice(6, 10))


def test_tensors_are_taken_too() -> None:
    image = flat(16, 16, 99)
    as_arrays = contact_sheet([image], [image], {(0, 0): image}, SIDE)
    tensor = as_tensor(image)
    assert (contact_sheet([tensor], [tensor], {(0, 0): tensor}, SIDE) == as_arrays).all()
    assert (contact_sheet([torch.zeros(3, 5, 5)], [], {}, SIDE)[SIDE + GAP :] == 0).all(), "contents alone"
