"""Files of every kind, and those that are none."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.style_transfer import images
from tasks.style_transfer.images import (
    SUFFIXES,
    as_pixels,
    as_tensor,
    find_images,
    fitted,
    image_size,
    read_image,
    resized,
    resized_sides,
    write_image,
)
from tests.shared import SHARED, needs_shared
from tests.tasks.style_transfer.painters import noise, slope

ORIENTATION = 0x0112


def write(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def pixel_rows(path: Path) -> Any:
    """What is read, after a look at the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        size = image_size(path)
        found = read_image(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    assert size == (found.shape[1], found.shape[0])
    return found.tolist()


def test_folders_are_searched_with_their_subfolders(tmp_path: Path) -> None:
    dot = Image.new("RGB", (2, 2))
    for name in ("b/z.png", "b/deep/er/a.JPG", "a.tiff", "b/.hidden.png", ".hidden/c.png", "again/x.webp"):
        write(tmp_path / name, dot)
    (tmp_path / "b/notes.txt").write_text("no image")
    (tmp_path / "b/folder.png").mkdir()
    everything = [tmp_path / name for name in ("a.tiff", "again/x.webp", "b/deep/er/a.JPG", "b/z.png")]
    assert find_images("data.styles", [tmp_path]) == everything
    assert find_images("data.styles", [tmp_path / "b", tmp_path / "again"]) == everything[1:]
    assert find_images("data.styles", [tmp_path / "b", tmp_path]) == everything, "each once"
    assert find_images("data.styles", [tmp_path / ".hidden"]) == [tmp_path / ".hidden/c.png"], "named outright"


def test_folders_that_hold_nothing_are_named(tmp_path: Path) -> None:
    write(tmp_path / "full/a.png", Image.new("RGB", (2, 2)))
    (tmp_path / "empty/deep").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^data.styles: there is no folder .*nowhere$"):
        find_images("data.styles", [tmp_path / "full", tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"^--style: no image in .*empty and its subfolders; images end in .png"):
        find_images("--style", [tmp_path / "full", tmp_path / "empty"])


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(where: Any) -> Any:  # root may read everything: no mode keeps these tests out
        if Path(where).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), where)
        return scan(where)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"closed: cannot be read: Permission denied"):
        find_images("data.styles", [tmp_path])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", Image.fromarray(slope(20, 30)))
    off = np.abs(np.array(pixel_rows(path)) - slope(20, 30))
    assert off.mean() <= (4 if suffix in (".jpg", ".jpeg", ".webp") else 0)


def test_grey_is_repeated(tmp_path: Path) -> None:
    grey = Image.new("L", (2, 1))
    grey.putdata([0, 100])
    assert pixel_rows(write(tmp_path / "l.png", grey)) == [[[0] * 3, [100] * 3]]
    assert pixel_rows(write(tmp_path / "1.png", grey.point([0] * 100 + [255] * 156).convert("1"))) == [
        [[0] * 3, [255] * 3]
    ]


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)])  # a fifth: 0.2 * 200 + 0.8 * 255 = 244
    assert pixel_rows(write(tmp_path / "rgba.png", rgba)) == [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    la = Image.new("LA", (2, 1))
    la.putdata([(0, 51), (100, 255)])
    assert pixel_rows(write(tmp_path / "la.png", la)) == [[[204] * 3, [100] * 3]]
    rgb = Image.new("RGB", (2, 1))
    rgb.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixel_rows(write(tmp_path / "key.png", rgb, transparency=(4, 5, 6))) == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize(
    ("transparency", "wanted"),
    [
        (None, [[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        (1, [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        (bytes([255, 0, 51]), [[255, 0, 0], [255, 255, 255], [204, 204, 255]]),
    ],
)
def test_palettes(tmp_path: Path, transparency: Any, wanted: Any) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    assert pixel_rows(write(tmp_path / "p.png", image, **options)) == [wanted]


def test_cmyk(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel_rows(write(tmp_path / "c.tif", ink))[0][0] == [255, 0, 0]
    found = pixel_rows(write(tmp_path / "c.jpg", ink))[8][8]
    assert np.abs(np.array(found) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("name", ["d.png", "d.tif"])
def test_16_bits_are_scaled_to_8_not_cut_off(tmp_path: Path, name: str) -> None:
    deep = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)  # 257 of them are one of 8 bits
    wanted = [[[value] * 3 for value in (0, 0, 1, 1, 128, 255)]]
    assert pixel_rows(write(tmp_path / name, Image.fromarray(deep))) == wanted
    whole = Image.fromarray(deep.astype(np.int32))  # as Pillow opens some files of 16 bits
    assert pixel_rows(write(tmp_path / "i.tif", whole)) == wanted


def test_16_bits_with_a_transparent_grey(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257, 514]], np.uint16))
    assert pixel_rows(write(tmp_path / "t.png", deep, transparency=257)) == [[[0] * 3, [255] * 3, [2] * 3]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 70000]], np.int32), r"from 0 to 70000; save it with 8 or 16 bits"),
        (np.array([[-1, 5]], np.int32), r"from -1 to 5"),
        (np.array([[0.0, 0.5]], np.float32), r"floating-point numbers; save it with 8 or 16 bits"),
    ],
)
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, values: Any, said: str) -> None:
    path = write(tmp_path / "x.tif", Image.fromarray(values))
    with pytest.raises(ValueError, match=rf"x.tif: cannot be read: its pixels .*{said}"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = [250, 0, 0]
    upright[:8, 16:] = [0, 250, 0]
    # What a camera that is held so writes: undone by the turn that the tag stands for.
    lying = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100} if suffix in ("jpg", "webp") else {}
    path = write(tmp_path / f"a.{suffix}", Image.fromarray(np.ascontiguousarray(lying)), exif=exif, **options)
    found = np.array(pixel_rows(path))
    assert found.shape == upright.shape
    corners = [[found[y, x].round(-1).tolist() for x in (4, 27)] for y in (4, 12)]
    assert np.abs(np.array(corners) - [[[250, 0, 0], [0, 250, 0]], [[0, 0, 0]] * 2]).max() <= 10


def test_a_photograph_with_broken_exif_is_taken_as_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=b"Exif\0\0no exif at all")
    assert image_size(path) == (8, 4)
    assert read_image(path).shape == (4, 8, 3)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGB", (4, 3), (0, 0, 255))
    path = write(tmp_path / "a.png", first, save_all=True, append_images=[second])
    assert pixel_rows(path) == [[[255, 0, 0]] * 4] * 3
    path = write(tmp_path / "a.webp", first, save_all=True, append_images=[second], lossless=True)
    assert pixel_rows(path) == [[[255, 0, 0]] * 4] * 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_named_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", Image.fromarray(noise(40, 40)))
    whole = path.read_bytes()
    for share in (0.05, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=rf"^[^\n]*a{suffix}: cannot be read: [^\n]+$"):
            read_image(path)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_what_is_no_image_is_named(tmp_path: Path, read: Any) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name, said in (
        ("empty.jpg", "not an image, or damaged"),
        ("text.png", "not an image, or damaged"),
        ("folder.png", "Is a directory"),
        ("nothing.png", "No such file or directory"),
    ):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: cannot be read: {said}$"):
            read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    path.chmod(0)
    with pytest.raises(ValueError, match=r"a.png: cannot be read: Permission denied"):
        read_image(path)


def test_large_pictures_are_read_and_larger_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.MAX_PIXELS >= 10_000 * 10_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 1200)
    for suffix in SUFFIXES:  # Pillow looks at the size of some kinds twice
        pixel_rows(write(tmp_path / f"large{suffix}", Image.new("RGB", (40, 30))))
        larger = write(tmp_path / f"larger{suffix}", Image.new("RGB", (41, 30)))
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=r"larger.*: 41 x 30 px are more than 1,200; make it smaller"):
                read(larger)
        assert Image.MAX_IMAGE_PIXELS == 100, "Pillow's limit is as it was"


@needs_shared("data/style")
def test_real_files() -> None:
    for folder in ("content", "vangogh"):
        for path in find_images("data.contents", [SHARED / "data/style" / folder])[:5]:
            width, height = image_size(path)
            assert read_image(path).shape == (height, width, 3)


def test_pixels_go_there_and_back() -> None:
    image = noise(5, 7)
    tensor = as_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 5, 7), torch.float32)
    assert tensor[0, 2, 3] * 255 == image[2, 3, 0], "red comes first"
    assert (as_pixels(tensor) == image).all()
    beyond = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 2.0]).view(1, 1, 4).expand(3, 1, 4)
    assert as_pixels(beyond)[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize(
    ("size", "shorter", "wanted"),
    [((100, 200), 50, (50, 100)), ((200, 100), 50, (100, 50)), ((3, 5), 30, (30, 50)), ((1, 9), 2, (2, 18))],
)
def test_the_shorter_side_is_brought_to_what_is_asked(
    size: tuple[int, int], shorter: int, wanted: tuple[int, int]
) -> None:
    found = resized(as_tensor(noise(*size)), shorter)
    assert tuple(found.shape) == (3, *wanted)
    assert found.min() >= 0
    assert found.max() <= 1


def test_resizing_is_antialiased_and_leaves_alone_what_fits() -> None:
    stripes = torch.zeros(3, 64, 64)
    stripes[..., ::3] = 1
    assert (resized(stripes, 16)[..., 2:-2] - 1 / 3).abs().max() < 0.05, "stripes too fine to see become grey"
    assert resized(stripes, 64) is stripes


def test_a_line_is_not_made_a_picture() -> None:
    with pytest.raises(ValueError, match=r"9000 x 1 px would become 4608000 x 512, .* to be 512; take a smaller one"):
        resized_sides(1, 9000, 512)


def test_fitting_brings_the_longer_side_to_what_is_asked() -> None:
    assert fitted(noise(100, 200), 50).shape == (25, 50, 3)
    assert fitted(noise(200, 100), 50).shape == (50, 25, 3)
    assert fitted(noise(10, 5), 20).shape == (20, 10, 3)
    assert fitted(noise(1, 1000), 50).shape == (1, 50, 3)
    assert np.abs(fitted(slope(100, 120), 60).astype(int) - slope(50, 60)).max() <= 2
    image = noise(30, 50)
    assert fitted(image, 50) is image


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", noise(5, 7))
    assert (read_image(tmp_path / "a.png") == noise(5, 7)).all()
    for name in ("a.jpg", "a.JPEG"):
        write_image(tmp_path / name, slope(32, 32))
        with Image.open(tmp_path / name) as image:
            assert image.format == "JPEG"
        assert np.abs(read_image(tmp_path / name).astype(int) - slope(32, 32)).mean() <= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JPEG", "a.jpg", "a.png"], "and nothing beside"


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.gif: cannot be written: its name must end in .png, .jpg, .jpeg"):
        write_image(tmp_path / "a.gif", noise(2, 2))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/a.png: cannot be written: File exists: .*/file$"):
        write_image(tmp_path / "file/a.png", noise(2, 2))
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match=r"b.png: cannot be written: Is a directory"):
        write_image(tmp_path / "b.png", noise(2, 2))
