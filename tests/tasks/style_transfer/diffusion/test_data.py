"""Which works train and which test, latents that are made once, noise that depends on nothing but its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from engine.utilities.batches import Batches, load_batches
from engine.utilities.seed import derive
from tasks.style_transfer.diffusion import data
from tasks.style_transfer.diffusion.base import Base, to_latents
from tasks.style_transfer.diffusion.data import Latents, Works, collections, noisy, pictures_in, read_resized
from tasks.style_transfer.diffusion.describe import describe
from tasks.style_transfer.images import as_tensor, read_image, resized

WIDE, HIGH = 13, 9
"""Latents of the pictures that ``write`` paints."""
SIDE = 4
STEP = 10


def write(folder: Path, *names: str) -> list[Path]:
    """Pictures whose red tells the column of latents, whose green tells the row, whose blue tells which one it is."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[: HIGH * 8, : WIDE * 8] // 8 * STEP
    for number, name in enumerate(names):
        pixels = np.stack([columns, rows, np.full_like(rows, STEP * number)], 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in names]


def painted(folder: Path, name: str, width: int, height: int, seed: int = 0) -> Path:
    """A picture without any symmetry."""
    folder.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder / name


class Means(nn.Module):
    """An autoencoder that can be reckoned: mean red, green and blue of 8 x 8 px, from -0.5 to 0.5, and a weight."""

    def __init__(self, weight: float = 1.0, scale: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.config = SimpleNamespace(scaling_factor=scale)
        self.encoded = 0

    def encode(self, pictures: Tensor) -> Any:
        self.encoded += len(pictures)
        means = F.avg_pool2d(pictures, 8)
        return SimpleNamespace(latents=torch.cat([means, self.weight.expand_as(means[:, :1])], 1))


def latents(room: Path, count: int = 3) -> Latents:
    paths = write(room / "works", *(f"{number}.png" for number in range(count)))
    return Latents(paths, Means(), HIGH * 8, room / "cache")


def place(square: tuple[Tensor, Tensor]) -> tuple[int, int, bool, int]:
    """Top, left, mirrored or not, and number, by what ``write`` painted; nothing else may be there."""
    found, small = square
    torch.testing.assert_close(found[:3], small - 0.5)
    red, green, blue = (small * 255 / STEP).round().int()
    mirrored = bool(red[0, 0] > red[0, -1])
    red = red.flip(1) if mirrored else red
    top, left = int(green[0, 0]), int(red[0, 0])
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in small.shape[1:]), indexing="ij")
    assert red.equal(columns.int() + left)
    assert green.equal(rows.int() + top)
    assert (blue == blue[0, 0]).all()
    return top, left, mirrored, int(blue[0, 0])


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stems(paths: Sequence[Path]) -> list[str]:
    return [path.stem for path in paths]


# Collections.


def test_every_so_many_works_are_held_out(tmp_path: Path) -> None:
    write(tmp_path / "monet", *(f"{number}.png" for number in range(7)))
    write(tmp_path / "cezanne", "a.png", "b.png", "c.png")
    folders = {"monet": [str(tmp_path / "monet")], "cezanne": [str(tmp_path / "cezanne")]}
    one, other = collections(folders, 3)
    assert (one.name, stems(one.train), stems(one.test)) == ("monet", ["1", "2", "4", "5"], ["0", "3", "6"])
    assert (other.name, stems(other.train), stems(other.test)) == ("cezanne", ["b", "c"], ["a"])


def test_a_folder_is_divided_alike_in_whatever_collection_it_is(tmp_path: Path) -> None:
    """So that no collection tests with what another one trains on."""
    for folder, count in (("monet", 5), ("sea", 4)):
        write(tmp_path / folder, *(f"{folder}{number}.png" for number in range(count)))
    (tmp_path / "again").symlink_to(tmp_path / "sea")
    monet, sea, again = (str(tmp_path / name) for name in ("monet", "sea", "again"))
    both, alone = collections({"both": [again, monet, sea], "alone": [monet]}, 2)
    assert stems(both.test) == ["sea0", "sea2", "monet0", "monet2", "monet4"]
    assert stems(both.train) == ["sea1", "sea3", "monet1", "monet3"]
    assert (stems(alone.test), stems(alone.train)) == (["monet0", "monet2", "monet4"], ["monet1", "monet3"])


@pytest.mark.parametrize("hold_out", [2, 5, 100])
def test_two_works_are_enough_to_hold_one_out_and_one_is_not(tmp_path: Path, hold_out: int) -> None:
    write(tmp_path, "a.png", "b.png")
    (found,) = collections({"monet": [str(tmp_path)]}, hold_out)
    assert (stems(found.train), stems(found.test)) == (["b"], ["a"])
    (tmp_path / "b.png").unlink()
    with pytest.raises(
        ValueError, match=r"^data.collections: 'monet' has 1 work\(s\) \(\S+a.png\), .*hold_out 0"
    ) as error:
        collections({"monet": [str(tmp_path)]}, hold_out)
    assert "\n" not in str(error.value)


def test_hold_out_0_tests_on_what_was_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (found,) = collections({"monet": [str(tmp_path)]}, 0)
    assert stems(found.train) == stems(found.test) == ["a"]


def test_pictures_of_scikit_image_come_with_it() -> None:
    found = pictures_in("x", ["scikit-image:photographs", "scikit-image:textures"])
    assert stems(found[:2]) == ["astronaut", "rocket"]
    assert stems(found[5:7]) == ["brick", "gravel"]
    assert len(set(found)) == 10
    assert all(path.is_file() for path in found)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("scikit-image:cats", r"^x: scikit-image has no 'cats' here; known: photographs, textures$"),
        ("/nowhere", r"^x: there is no folder /nowhere$"),
        ("tests/tasks/style_transfer/lsast", r"^x: no image in tests/tasks/style_transfer/lsast and its subfolders"),
    ],
)
def test_folders_without_pictures_are_named(folder: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pictures_in("x", ["scikit-image:textures", folder])


def test_a_picture_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "works", "a.png")
    write(tmp_path / "works/late", "b.png", "c.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "works/late")
    every = ["scikit-image:textures", "works/late", str(tmp_path / "works"), "link", "scikit-image:textures"]
    assert stems(pictures_in("x", every))[5:] == ["b", "c", "a"]


# Latents.


def test_latents_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, vae = write(tmp_path / "works", "a.png", "b.png"), Means()
    one = Latents(paths, vae, HIGH * 8, tmp_path / "deep/cache")
    assert vae.encoded == 4, "two pictures, as they are and mirrored"
    assert "encoding 2 pictures, once" in capsys.readouterr().out
    (folder,) = (tmp_path / "deep/cache").iterdir()
    assert [path.name for path in folder.iterdir()] == ["latents.safetensors"]
    other = Latents(paths, vae, HIGH * 8, tmp_path / "deep/cache")
    assert vae.encoded == 4
    assert not capsys.readouterr().out
    assert one._tensors.keys() == other._tensors.keys()
    for seed in range(4):
        found = [each.draw(1, SIDE, chance(seed)) for each in (one, other)]
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


CHANGES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "another autoencoder": lambda given, path: given.update(vae=Means(1.5)),
    "another scale of latents": lambda given, path: given.update(vae=Means(scale=1.0)),
    "another size": lambda given, path: given.update(shorter=32),
    "another order": lambda given, path: given.update(paths=given["paths"][::-1]),
    "fewer pictures": lambda given, path: given.update(paths=given["paths"][:1]),
    "a changed picture": lambda given, path: painted(path.parent, path.name, WIDE * 8, HIGH * 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_latents_hang_on_makes_another_file(tmp_path: Path, change: str) -> None:
    given: dict[str, Any] = {"paths": write(tmp_path / "works", "a.png", "b.png"), "vae": Means(), "shorter": HIGH * 8}
    given["cache"] = tmp_path / "cache"
    Latents(**given)
    CHANGES[change](given, tmp_path / "works/b.png")
    encoded = given["vae"].encoded
    found = Latents(**given)
    assert given["vae"].encoded == encoded + 2 * len(given["paths"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for number, path in enumerate(given["paths"]):
        wanted, _ = to_latents(given["vae"], read_resized(path, given["shorter"])[None])
        assert torch.equal(found._tensors[f"{number}.0.mean"], wanted[0])


def test_after_an_error_nothing_is_kept(tmp_path: Path) -> None:
    paths = write(tmp_path / "works", "a.png", "b.png")
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^\S*b.png: cannot be read: [^\n]*$"):
        Latents(paths, Means(), HIGH * 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_squares_come_from_anywhere_mirrored_half_of_the_time(tmp_path: Path) -> None:
    made = latents(tmp_path)
    drawn = [place(made.draw(seed % 3, SIDE, chance(seed))) for seed in range(600)]
    assert [number for *_, number in drawn] == [0, 1, 2] * 200
    for mirrored in (False, True):
        here = [each for each in drawn if each[2] == mirrored]
        assert 240 < len(here) < 360
        assert {top for top, *_ in here} == set(range(HIGH - SIDE + 1))
        assert {left for _, left, *_ in here} == set(range(WIDE - SIDE + 1))
    assert len({each[:2] for each in drawn}) == (HIGH - SIDE + 1) * (WIDE - SIDE + 1)


@pytest.fixture(scope="module")
def taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


def test_mirrored_latents_are_those_of_the_mirrored_picture(tmp_path: Path, taesd: AutoencoderTiny) -> None:
    plain = painted(tmp_path, "plain.png", 64, 64)
    Image.fromarray(read_image(plain)[:, ::-1]).save(tmp_path / "mirrored.png")
    made = Latents([plain, tmp_path / "mirrored.png"], taesd, 64, tmp_path / "cache")
    plainly = next(seed for seed in range(20) if not int(torch.randint(2, (), generator=chance(seed))))
    as_it_is, mirrored = (made.draw(number, 8, chance(plainly)) for number in (0, 1))
    assert not torch.allclose(as_it_is[0].flip(2), mirrored[0], atol=1e-4), "not the latents, mirrored"
    seen = Counter[bool]()
    for seed in range(10):
        found = made.draw(0, 8, chance(seed))  # as large as the picture
        other = bool(torch.equal(found[0], mirrored[0]))
        for wanted, part in zip(mirrored if other else as_it_is, found, strict=True):
            assert torch.equal(wanted, part)
        seen[other] += 1
    assert len(seen) == 2


def with_deviation() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


def test_an_autoencoder_with_a_deviation_draws_around_the_mean(tmp_path: Path) -> None:
    vae, path = with_deviation(), painted(tmp_path, "a.png", 32, 32)
    made = Latents([path], vae, 32, tmp_path / "cache")
    with torch.no_grad():
        mean, deviation = to_latents(vae, read_resized(path, 32)[None])
    assert deviation is not None
    drawn = torch.stack([found for found, _ in (made.draw(0, 4, chance(seed)) for seed in range(1000))])
    unmirrored = [seed for seed in range(1000) if not int(torch.randint(2, (), generator=chance(seed)))]
    drawn = drawn[unmirrored]
    assert 400 < len(drawn) < 600
    apart = (drawn.mean(0) - mean[0]).abs() / deviation[0] * len(drawn) ** 0.5
    assert apart.max() < 5
    torch.testing.assert_close(drawn.std(0), deviation[0], rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("width", "height", "sides"), [(100, 67, (32, 40)), (67, 100, (40, 32)), (400, 30, (32, 424)), (33, 33, (32, 32))]
)
def test_pictures_of_any_size_are_cut_to_whole_latents(
    tmp_path: Path, width: int, height: int, sides: tuple[int, int]
) -> None:
    """100 x 67 px become 48 x 32; with 33 px for the shorter side 49 x 33."""
    path = painted(tmp_path, "a.png", width, height)
    for shorter in (32, 33):
        found = read_resized(path, shorter)
        assert all(side % 8 == 0 for side in found.shape[1:])
        whole = resized(as_tensor(read_image(path)), shorter)
        assert torch.equal(found, whole[:, : found.shape[1], : found.shape[2]])
        assert all(0 <= long - short < 8 for long, short in zip(whole.shape[1:], found.shape[1:], strict=True))
        made = Latents([path], Means(), shorter, tmp_path / "cache")
        for seed in range(8):
            square, small = made.draw(0, 4, chance(seed))
            assert (square.shape, small.shape) == ((4, 4, 4), (3, 4, 4))
    assert min(found.shape[1:]) == min(sides)


# Noise.


def scheduler(kind: str = "epsilon") -> DDPMScheduler:
    made: DDPMScheduler = DDPMScheduler.from_config(Base("tiny").scheduler.config, prediction_type=kind)
    return made


@pytest.mark.parametrize("t", [0, 499, 999])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_what_is_to_be_predicted(kind: str, t: int) -> None:
    square, noise = (torch.randn(4, 5, 5), torch.rand(3, 5, 5)), torch.randn(4, 5, 5)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas)[: t + 1].prod())
    signal, deviation = kept**0.5, (1 - kept) ** 0.5
    found = noisy(square, torch.tensor(t), noise, scheduler(kind))
    torch.testing.assert_close(found.x, signal * square[0] + deviation * noise, rtol=1e-4, atol=1e-4)
    wanted = {"epsilon": noise, "sample": square[0], "v_prediction": signal * noise - deviation * square[0]}
    torch.testing.assert_close(found.target, wanted[kind], rtol=1e-4, atol=1e-4)
    assert (int(found.t), found.words) == (t, describe(square[1]))


def works(room: Path, repeat: int = 1, seed: int = 0) -> Works:
    return Works(latents(room), 3, repeat, SIDE, scheduler(), seed)


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.equal(b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    drawn, again = works(tmp_path, repeat=2, seed=5), works(tmp_path, repeat=2, seed=5)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    sample = drawn[2, 4]
    assert torch.get_rng_state().equal(state)
    drawn[0, 1], again[1, 5]
    torch.rand(1)
    assert same(drawn[2, 4], sample)
    assert same(again[2, 4], sample)
    others = [drawn[3, 4], drawn[2, 1], works(tmp_path, repeat=2, seed=6)[2, 4]]
    for other in others:
        assert other[3] == sample[3], "the same work"
        assert not same(other, sample)
        assert not other[2].equal(sample[2])


def test_every_work_comes_as_often_in_an_epoch(tmp_path: Path) -> None:
    drawn = works(tmp_path, repeat=4)
    assert len(drawn) == 12
    assert [drawn[1, index][3] for index in range(12)] == [0, 1, 2] * 4


def test_samples_are_noisy_squares_of_their_works(tmp_path: Path) -> None:
    drawn = works(tmp_path)
    kept = drawn.scheduler.alphas_cumprod
    for epoch in range(20):
        x, t, noise, number, words, _ = drawn[epoch, 1]
        square = (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
        if t < 700:  # else little is left of the square
            small = ((square[:3] + 0.5) * 255 / STEP).round() * STEP / 255
            assert place((small - 0.5, small))[3] == number == 1  # type: ignore[arg-type]
            assert words == describe(small)


def test_times_luck_and_noise_are_spread_evenly(tmp_path: Path) -> None:
    drawn = works(tmp_path, repeat=400)
    samples = [drawn[0, index] for index in range(1200)]
    times, luck = torch.stack([t for _, t, *_ in samples]) / 1000, torch.stack([each for *_, each in samples])
    for values in (times, luck):
        counts = torch.histc(values, 10, 0, 1)
        assert 80 < counts.min() <= counts.max() < 160
    assert torch.corrcoef(torch.stack([times, luck]))[0, 1].abs() < 0.1
    noise = torch.stack([target for _, _, target, *_ in samples])
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_workers_change_no_bit(tmp_path: Path) -> None:
    drawn, plan = works(tmp_path, repeat=4), Batches(12, batch=4, accumulate=2)
    whole, parts = (list(load_batches(drawn, plan, 1, shuffle=0, workers=count)) for count in (0, 1))
    assert len(whole) == 3
    assert [tuple(micro[0].shape) for step in whole for micro in step] == [(2, 4, SIDE, SIDE)] * 6
    for one, other in zip(whole, parts, strict=True):
        for micro, again in zip(one, other, strict=True):
            assert same([*micro[:4], *micro[4], micro[5]], [*again[:4], *again[4], again[5]])


def test_works_are_tested_in_the_middle_of_equal_parts_of_the_noises_course(tmp_path: Path) -> None:
    made = latents(tmp_path)
    found = list(data.held_out_squares(made, [2, 0], 2, SIDE, scheduler(), seed=3))
    assert [(number, noise) for number, noise, _ in found] == [
        *[(2, 0)] * 10, *[(2, 1)] * 10, *[(0, 0)] * 10, *[(0, 1)] * 10
    ]  # fmt: skip
    assert [int(each.t) for *_, each in found] == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950] * 4
    kept = scheduler().alphas_cumprod
    squares = [made.draw(n, SIDE, chance(derive(3, "square", noise, n))) for n in (2, 0) for noise in (0, 1)]
    for position, (number, noise, each) in enumerate(found):
        wanted = torch.randn(4, SIDE, SIDE, generator=chance(derive(3, "test", noise, number, position % 10)))
        assert torch.equal(each.target, wanted)
        square, small = squares[position // 10]  # one for each noise, at all times
        torch.testing.assert_close(each.x, kept[each.t].sqrt() * square + (1 - kept[each.t]).sqrt() * wanted)
        assert each.words == describe(small)
    assert len({tuple(each.target.flatten().tolist()) for *_, each in found}) == 40, "each its own"
    assert len({place(square) for square in squares}) == 4


def test_tests_have_equal_noise_for_equal_seeds(tmp_path: Path) -> None:
    made = latents(tmp_path)

    def every(numbers: Sequence[int], count: int, seed: int) -> dict[tuple[int, int, int], Tensor]:
        torch.rand(1)
        found = data.held_out_squares(made, numbers, count, SIDE, scheduler(), seed)
        return {(number, noise, int(each.t)): each.x for number, noise, each in found}

    few, many, others = every([1], 1, 3), every([0, 1], 2, 3), every([1], 1, 4)
    assert len(few) == 10
    for key, x in few.items():
        assert torch.equal(many[key], x)
        assert not torch.equal(others[key], x)
