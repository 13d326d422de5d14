"""The works of collections as noisy latents, with the same bits whatever loads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from engine.utilities.console import console, progress_bar
from engine.utilities.files import made_once
from engine.utilities.seed import derive
from tasks import scikit_image
from tasks.images import divided
from tasks.style_transfer.diffusion.base import PREDICTIONS, SCALE, to_latents
from tasks.style_transfer.diffusion.describe import describe
from tasks.style_transfer.images import as_tensor, find_images, read_image, resized

FORMAT = 1
"""Version of the files that hold latents; it is part of their name."""
SCIKIT_IMAGE = "scikit-image:"
"""Prefix of folders that stand for all of scikit-image's pictures of one kind."""
TIMES = 10
"""Number of timesteps that a work is tested at, in the middle of equal parts of all timesteps."""


@dataclass(frozen=True)
class Collection:
    """The files of a collection for training and for testing."""

    name: str
    train: list[Path]
    test: list[Path]


def pictures_in(key: str, folders: Sequence[str]) -> list[Path]:
    """All image files in ``folders``, each once; a folder may be scikit-image's (``scikit-image:photographs``).

    Raises:
        ValueError: a folder is missing or has no image.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.startswith(SCIKIT_IMAGE):
            found += find_images(key, [Path(folder)])
            continue
        name = folder.removeprefix(SCIKIT_IMAGE)
        kinds = scikit_image.PICTURES
        if name not in kinds:
            raise ValueError(f"{key}: scikit-image has no {name!r} here; known: {', '.join(kinds)}")
        found += scikit_image.pictures(*kinds[name]["train"], *kinds[name]["test"])
    once = dict[Path, Path]()
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def collections(folders: Mapping[str, Sequence[str]], hold_out: int) -> list[Collection]:
    """The collections; in each of their folders every ``hold_out``-th work, from the first on, is held out for testing.

    A folder is divided by itself, and therefore in the same way in every collection that it belongs to.

    Raises:
        ValueError: a folder is missing or has no image, or a collection has too few works to hold one out.
    """
    found = []
    for name, places in folders.items():
        works = pictures_in("data.collections", places)
        train = test = works
        if hold_out:
            each = (divided(pictures_in("data.collections", [place]), hold_out) for place in places)
            held = {path.resolve() for _, paths in each for path in paths}
            test = [work for work in works if work.resolve() in held]
            train = [work for work in works if work.resolve() not in held]
        if not train:
            raise ValueError(
                f"data.collections: {name!r} has {len(works)} work(s) ({works[0]}), which testing takes, so that none "
                "is left to train on; add works, or set data.hold_out 0 to test on what was trained on"
            )
        found.append(Collection(name, train, test))
    return found


def read_resized(path: Path, shorter: int) -> Tensor:
    """A picture (3, H, W) from 0 to 1, its shorter side ``shorter`` px, cropped to multiples of ``SCALE``.

    Raises:
        ValueError: the file cannot be read, or is too narrow.
    """
    picture = resized(as_tensor(read_image(path)), shorter)
    height, width = (side // SCALE * SCALE for side in picture.shape[1:])
    return picture[:, :height, :width]


class Latents:
    """Latents of whole pictures, plain and mirrored, computed once and kept in a file.

    Squares are cropped from latents instead of pictures: every epoch sees other squares, and the autoencoder runs only
    once. (It is our choice to accept that the surroundings of a square influence its latents a little.)

    Args:
        vae: the autoencoder, in evaluation mode, on the device that computes.
        shorter: length of the pictures' shorter side in pixels.
    """

    def __init__(self, paths: Sequence[Path], vae: Any, shorter: int, cache: Path) -> None:
        digest = hashlib.sha256(repr((FORMAT, shorter, float(vae.config.scaling_factor))).encode())
        for _, weight in sorted(vae.state_dict().items()):
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        folder = cache / f"latents_{digest.hexdigest()[:16]}"
        if not folder.is_dir():
            console.print(f"encoding {len(paths)} pictures, once: {folder} will have their latents")
            with made_once(folder) as made:
                save_file(_encoded(paths, vae, shorter), made / "latents.safetensors")
        self._tensors = load_file(folder / "latents.safetensors")

    def draw(self, number: int, side: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random square of picture ``number``, mirrored half of the time.

        Returns its latents (4, side, side), and the square of the picture at the same size (3, side, side), from 0 to
        1.
        """
        mirrored = bool(torch.randint(2, (), generator=chance))
        mean = self._tensors[f"{number}.{int(mirrored)}.mean"]
        starts = [length - side + 1 for length in mean.shape[1:]]
        top, left = (int(torch.randint(count, (), generator=chance)) for count in starts)
        place = slice(None), slice(top, top + side), slice(left, left + side)
        small = self._tensors[f"{number}.{int(mirrored)}.small"][place]
        deviation = self._tensors.get(f"{number}.{int(mirrored)}.deviation")
        if deviation is None:
            return mean[place], small
        return mean[place] + deviation[place] * torch.randn(4, side, side, generator=chance), small


@torch.no_grad()
def _encoded(paths: Sequence[Path], vae: Any, shorter: int) -> dict[str, Tensor]:
    device, found = next(vae.parameters()).device, dict[str, Tensor]()
    with progress_bar() as bar:
        for number, path in enumerate(bar.track(paths, description="latents")):
            picture = read_resized(path, shorter).to(device)
            for mirrored, each in enumerate((picture, picture.flip(2))):
                found[f"{number}.{mirrored}.small"] = F.avg_pool2d(each, SCALE).cpu().contiguous()
                for name, tensor in zip(("mean", "deviation"), to_latents(vae, each[None]), strict=True):
                    if tensor is not None:
                        found[f"{number}.{mirrored}.{name}"] = tensor[0].float().cpu().contiguous()
    return found


@dataclass(frozen=True)
class Noisy:
    """A square of latents with noise, ``x`` (4, s, s) at timestep ``t``, and the ``target`` of the denoiser.

    ``words`` are what ``describe`` says about the square.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    words: str


def noisy(square: tuple[Tensor, Tensor], t: Tensor, noise: Tensor, scheduler: DDPMScheduler) -> Noisy:
    """A square from ``Latents.draw`` with ``noise`` (4, s, s) at timestep ``t`` (a scalar)."""
    latents, small = square
    one = latents[None], noise[None], t[None]
    kind = scheduler.config.prediction_type
    assert kind in PREDICTIONS, f"Base refuses a scheduler of {kind!r}"
    target = {"epsilon": noise, "sample": latents}.get(kind)
    if target is None:
        target = scheduler.get_velocity(*one)[0]
    return Noisy(scheduler.add_noise(*one)[0], t, target, describe(small))


class Works(Dataset[tuple[Tensor, Tensor, Tensor, int, str, Tensor]]):
    """Noisy squares of works, asked for as (epoch, index): ``x``, ``t``, target, number of the work, words, luck.

    Works take turns by index. The square, the noise, the timestep and the luck (a random number from 0 to 1) depend
    only on (seed, epoch, index).
    """

    def __init__(
        self, latents: Latents, count: int, repeat: int, side: int, scheduler: DDPMScheduler, seed: int
    ) -> None:
        self.latents, self.count, self.repeat, self.side = latents, count, repeat, side
        self.scheduler, self.seed = scheduler, seed

    def __len__(self) -> int:
        return self.count * self.repeat

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int, str, Tensor]:
        epoch, index = item
        chance = torch.Generator().manual_seed(derive(self.seed, "sample", epoch, index))
        number = index % self.count
        square = self.latents.draw(number, self.side, chance)
        noise = torch.randn(square[0].shape, generator=chance)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (), generator=chance)
        made = noisy(square, t, noise, self.scheduler)
        return made.x, made.t, made.target, number, made.words, torch.rand((), generator=chance)


def held_out_squares(
    latents: Latents, numbers: Sequence[int], noises: int, side: int, scheduler: DDPMScheduler, seed: int
) -> Iterator[tuple[int, int, Noisy]]:
    """Squares of the works ``numbers``, one per noise, at ``TIMES`` timesteps each: (work, noise's number, square)."""
    steps = scheduler.config.num_train_timesteps
    for number in numbers:
        for each in range(noises):
            for time in range(TIMES):
                chance = torch.Generator().manual_seed(derive(seed, "test", each, number, time))
                square = latents.draw(number, side, torch.Generator().manual_seed(derive(seed, "square", each, number)))
                noise = torch.randn(square[0].shape, generator=chance)
                t = torch.tensor((2 * time + 1) * steps // (2 * TIMES))
                yield number, each, noisy(square, t, noise, scheduler)
