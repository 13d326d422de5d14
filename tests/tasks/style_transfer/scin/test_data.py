"""Which images train and which test, and which squares of them make pairs."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.utilities.batches import Batches, load_batches
from tasks.style_transfer.scin import data
from tasks.style_transfer.scin.config import DataConfig
from tasks.style_transfer.scin.data import PHOTOGRAPHS, Pairs, image_files
from tests.shared import SHARED, needs_shared

WIDTH, HEIGHT = 80, 64


def write(folder: Path, names: Sequence[str]) -> str:
    """Images whose red tells the column, whose green tells the row, and whose blue tells which one it is."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number, name in enumerate(names):
        pixels = np.stack([columns, rows, np.full_like(rows, number)], 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=95)
    return str(folder)


def numbered(count: int) -> list[str]:
    return [f"{number:02}.png" for number in range(count)]


def config(root: Path, contents: int = 6, styles: int = 4, **changes: Any) -> DataConfig:
    """Of small images that need no resizing."""
    return DataConfig(
        name="folders",
        contents=[write(root / "contents", numbered(contents))],
        styles=[write(root / "styles", numbered(styles))],
        test_contents=[write(root / "test_contents", numbered(3))],
        test_styles=[write(root / "test_styles", numbered(2))],
        **{"resize": HEIGHT, "crop": 32, **changes},
    )


def pairs(settings: DataConfig, seed: int = 0) -> Pairs:
    return Pairs(image_files(settings), settings, seed)


def place(square: Tensor) -> tuple[int, int, bool, int]:
    """Top, left, mirrored or not, and number, by what ``write`` painted; nothing else may be there."""
    red, green, blue = (square * 255).round().int()
    mirrored = bool(red[0, 0] > red[0, -1])
    red = red.flip(1) if mirrored else red
    top, left = int(green[0, 0]), int(red[0, 0])
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in square.shape[1:]), indexing="ij")
    assert red.equal(columns.int() + left)
    assert green.equal(rows.int() + top)
    assert (blue == blue[0, 0]).all()
    return top, left, mirrored, int(blue[0, 0])


def test_every_so_many_images_are_held_out(tmp_path: Path) -> None:
    settings = config(tmp_path, contents=10, styles=3, hold_out=4)
    settings.test_contents, settings.test_styles = [], []
    files = image_files(settings)
    assert [path.stem for path in files.test_contents] == ["00", "04", "08"]
    assert [path.stem for path in files.contents] == ["01", "02", "03", "05", "06", "07", "09"]
    assert [path.stem for path in files.test_styles] == ["00"]
    assert [path.stem for path in files.styles] == ["01", "02"]


@pytest.mark.parametrize("hold_out", [2, 3, 100])
def test_two_images_are_enough_to_hold_one_out_and_one_is_not(tmp_path: Path, hold_out: int) -> None:
    settings = config(tmp_path, styles=2, hold_out=hold_out)
    settings.test_styles = []
    files = image_files(settings)
    assert (len(files.styles), len(files.test_styles)) == (1, 1)
    (tmp_path / "styles/01.png").unlink()
    with pytest.raises(ValueError, match=r"data.styles: 1 image \(.*00.png\).*add images, or name .* data.test_styles"):
        image_files(settings)


def test_folders_to_test_with_leave_all_others_to_training(tmp_path: Path) -> None:
    files = image_files(config(tmp_path, hold_out=2))
    found = [len(paths) for paths in (files.contents, files.styles, files.test_contents, files.test_styles)]
    assert found == [6, 4, 3, 2]


@pytest.mark.parametrize("key", ["contents", "styles"])
def test_an_image_to_train_and_to_test_is_named(tmp_path: Path, key: str) -> None:
    settings = config(tmp_path)
    (tmp_path / "test_contents/again.png").symlink_to(tmp_path / key / "02.png")
    setattr(settings, f"test_{key}", [str(tmp_path / "test_contents")])
    with pytest.raises(ValueError, match=rf"data.{key}: .*/02.png is for training and, as .*again.png, for testing"):
        image_files(settings)
    setattr(settings, f"test_{key}", [])
    getattr(settings, key).append(str(tmp_path / "test_contents"))
    (tmp_path / "test_contents/again.png").unlink()
    (tmp_path / key / "second.png").symlink_to(tmp_path / key / "00.png")  # the first is held out
    with pytest.raises(ValueError, match=rf"data.{key}: .*second.png is for training and, as .*00.png, for testing"):
        image_files(settings)


@pytest.mark.parametrize("key", ["contents", "styles", "test_contents", "test_styles"])
def test_a_folder_that_is_not_there_is_named_by_its_key(tmp_path: Path, key: str) -> None:
    settings = config(tmp_path)
    setattr(settings, key, [str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=f"data.{key}: .*nowhere"):
        image_files(settings)


def test_photographs_come_with_scikit_image() -> None:
    settings = DataConfig()
    files = image_files(settings)
    assert len({name for names in PHOTOGRAPHS.values() for name in names}) == sum(map(len, PHOTOGRAPHS.values()))
    content, style = pairs(settings)[0, 0]
    assert content.shape == style.shape == (3, 256, 256)
    test = data.TestPairs(files, settings)
    assert (test.content_names, test.style_names) == (["chelsea", "coffee"], ["grass", "ihc"])
    content, style, index = test[0, 3]
    assert (content.shape, style.shape, index) == ((3, 256, 256), (3, 256, 256), 3)


def test_squares_come_from_anywhere_mirrored_half_of_the_time(tmp_path: Path) -> None:
    settings = config(tmp_path, repeat=100)
    drawn = pairs(settings)
    assert len(drawn) == 600
    for kind in (0, 1):
        seen = [place(drawn[0, index][kind]) for index in range(600)]
        assert {top for top, *_ in seen} == set(range(HEIGHT - 32 + 1))
        assert {left for _, left, *_ in seen} == set(range(WIDTH - 32 + 1))
        assert 240 < sum(mirrored for *_, mirrored, _ in seen) < 360
        count = (6, 4)[kind]
        assert {number for *_, number in seen} == set(range(count))
    both = [(place(content)[:3], place(style)[:3]) for content, style in (drawn[1, index] for index in range(30))]
    assert sum(content == style for content, style in both) < 3, "each has its own square"


def test_a_square_as_large_as_the_image_is_all_of_it(tmp_path: Path) -> None:
    drawn = pairs(config(tmp_path, crop=HEIGHT))
    assert {place(drawn[0, index][0])[0] for index in range(6)} == {0}


def test_images_are_brought_to_their_size_first(tmp_path: Path) -> None:
    settings = config(tmp_path, resize=HEIGHT * 2, crop=HEIGHT * 2)
    content, _ = pairs(settings)[0, 0]
    rows = content[1, :, 0] * 255
    assert rows[0] < 1
    assert rows[-1] > HEIGHT - 2, "enlarged"
    settings.resize = settings.crop = 16
    rows = pairs(settings)[0, 0][0][1, :, 0] * 255
    assert rows.diff().mean() == pytest.approx(HEIGHT / 16, abs=0.1), "made smaller"


def test_photographs_take_turns_and_paintings_are_used_evenly(tmp_path: Path) -> None:
    drawn = pairs(config(tmp_path, contents=7, styles=4, repeat=3))
    assert [place(drawn[0, index][0])[3] for index in range(21)] == [*range(7)] * 3
    order = [drawn.style_of(0, index) for index in range(21)]
    assert [place(drawn[0, index][1])[3] for index in range(21)] == order
    assert all(sorted(order[start : start + 4]) == [0, 1, 2, 3] for start in range(0, 20, 4))
    assert sorted(Counter(order).values()) == [5, 5, 5, 6]


def test_more_paintings_than_pairs_are_used_once_at_most(tmp_path: Path) -> None:
    drawn = pairs(config(tmp_path, contents=3, styles=8))
    epochs = [[drawn.style_of(epoch, index) for index in range(3)] for epoch in range(30)]
    assert all(len(set(styles)) == 3 for styles in epochs)
    assert {style for styles in epochs for style in styles} == set(range(8)), "others in other epochs"


def test_a_photograph_meets_other_paintings_in_every_round_and_epoch(tmp_path: Path) -> None:
    drawn = pairs(config(tmp_path, contents=4, styles=4, repeat=40))
    assert {drawn.style_of(0, index) for index in range(0, 160, 4)} == {0, 1, 2, 3}
    assert {drawn.style_of(epoch, 0) for epoch in range(40)} == {0, 1, 2, 3}
    orders = [[pairs(drawn.config, seed).style_of(0, index) for index in range(160)] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_pairs_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    settings = config(tmp_path, repeat=2)
    drawn = pairs(settings, seed=5)
    random.seed(9)
    torch.manual_seed(9)
    states = random.getstate(), torch.get_rng_state()
    content, style = drawn[2, 7]
    assert random.getstate() == states[0]
    assert torch.get_rng_state().equal(states[1])
    again = pairs(settings, seed=5)
    again[0, 1], again[3, 7]
    for both in (drawn[2, 7], again[2, 7]):
        assert both[0].equal(content)
        assert both[1].equal(style)
    others = [drawn[3, 7], drawn[2, 1], pairs(settings, seed=6)[2, 7]]
    assert not any(other[0].equal(content) for other in others)


def test_workers_and_where_an_epoch_is_entered_change_no_bit(tmp_path: Path) -> None:
    settings = config(tmp_path, repeat=3)
    plan = Batches(18, batch=4, accumulate=2, drop_last=True)
    whole = list(load_batches(pairs(settings), plan, 1, shuffle=0))
    assert [[tuple(part[0].shape) for part in batch] for batch in whole] == [[(2, 3, 32, 32)] * 2] * 4
    with_workers = list(load_batches(pairs(settings), plan, 1, shuffle=0, workers=2))
    later = list(load_batches(pairs(settings), plan, 1, shuffle=0, start=2, workers=1))
    for one, other in ((whole, with_workers), (whole[2:], later)):
        for mine, theirs in zip(one, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a[0].equal(b[0])
                assert a[1].equal(b[1])


@pytest.mark.parametrize("key", ["contents", "styles", "test_contents", "test_styles"])
def test_a_file_that_is_no_image_is_named_before_training(tmp_path: Path, key: str) -> None:
    settings = config(tmp_path)
    (tmp_path / key / "bad.jpg").write_bytes(b"no image")
    files = image_files(settings)
    settings.tests = 9
    with pytest.raises(ValueError, match=f"{key}/bad.jpg: cannot be read"):
        pairs(settings) if key in ("contents", "styles") else data.TestPairs(files, settings)


def test_a_line_is_named_before_training(tmp_path: Path) -> None:
    settings = config(tmp_path, resize=512)
    Image.new("L", (10_000, 1)).save(tmp_path / "styles/line.png")
    with pytest.raises(ValueError, match=r"line.png: 10000 x 1 px would become .* a smaller one"):
        pairs(settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_is_named_when_it_is_read(tmp_path: Path, workers: int) -> None:
    settings = config(tmp_path, contents=2)
    write(tmp_path / "contents", ["whole.jpg", "cut.jpg"])
    file = tmp_path / "contents/cut.jpg"
    file.write_bytes(file.read_bytes()[:-200])  # the header is whole
    drawn = pairs(settings)
    with pytest.raises(ValueError, match=r"^\S*cut.jpg: cannot be read: [^\n]*truncated[^\n]*$"):
        list(load_batches(drawn, Batches(len(drawn), 1), 0, workers=workers))


def test_images_beyond_what_is_kept_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Path) -> Any:
        read.append(path.name)
        return np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    monkeypatch.setattr(data, "KEPT", HEIGHT * WIDTH * 3)  # one photograph and one painting
    monkeypatch.setattr(data, "read_image", reading)
    images = pairs(config(tmp_path)).contents
    for number in (3, 4, 3, 4):
        images.pixels(number)
    assert read == ["03.png", "04.png", "04.png"]


def test_test_photographs_meet_all_test_paintings(tmp_path: Path) -> None:
    settings = config(tmp_path, crop=HEIGHT)
    test = data.TestPairs(image_files(settings), settings)
    assert len(test) == 6
    assert (test.content_names, test.style_names) == (["00", "01", "02"], ["00", "01"])
    seen = []
    for index in range(len(test)):
        content, style, number = test[0, index]
        assert number == index
        for square in (content, style):
            assert place(square)[:3] == (0, (WIDTH - HEIGHT) // 2, False), "the middle"
        seen.append((place(content)[3], place(style)[3]))
        assert test.place(index) == seen[-1]
        assert test.content(seen[-1][0]).equal(content)
        assert test.style(seen[-1][1]).equal(style)
        assert test[7, index][0].equal(content), "in every epoch"
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_test_images_show_all_of_the_shorter_side(tmp_path: Path) -> None:
    settings = config(tmp_path, crop=32)
    rows = data.TestPairs(image_files(settings), settings).content(0)[1, :, 0] * 255
    assert len(rows) == 32
    assert rows[0] < 2
    assert rows[-1] > HEIGHT - 3


def test_tests_are_spread_over_the_set(tmp_path: Path) -> None:
    settings = config(tmp_path, tests=2)
    write(tmp_path / "test_contents", numbered(9))
    test = data.TestPairs(image_files(settings), settings)
    assert (test.content_names, test.style_names) == (["00", "04"], ["00", "01"])
    settings.tests = 5
    assert data.TestPairs(image_files(settings), settings).content_names == ["00", "01", "03", "05", "07"]


@needs_shared("data/style")
def test_real_photographs_and_paintings() -> None:
    root = SHARED / "data/style"
    settings = DataConfig(name="folders", contents=[str(root / "content")], styles=[str(root / "vangogh")])
    files = image_files(settings)
    assert (len(files.contents), len(files.test_contents)) == (72, 8)
    assert (len(files.styles), len(files.test_styles)) == (32, 4)
    drawn = pairs(settings)
    for index in (0, 71):
        for square in drawn[0, index]:
            assert square.shape == (3, 256, 256)
            assert square.std() > 0.02
