"""Images and labels, with the same bits in the same order whatever loads them."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from engine.utilities.files import made_once
from engine.utilities.seed import derive
from engine.utilities.text import one_line
from tasks.classification.config import DataConfig
from tasks.images import SUFFIXES, hidden, opened, pixels_of
from tasks.scikit_learn import Scan, digit_scans

MEAN = {"digits": (0.3055,) * 3, "cifar10": (0.4914, 0.4822, 0.4465), "svhn": (0.4377, 0.4438, 0.4728)}
STD = {"digits": (0.3762,) * 3, "cifar10": (0.2470, 0.2435, 0.2616), "svhn": (0.1980, 0.2010, 0.1970)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[tuple[Tensor, int]]):
    """A data set with transforms whose randomness depends on (seed, epoch, index) alone.

    Items are indexed by (epoch, index).
    """

    def __init__(self, source: Any, labels: Sequence[int], classes: Sequence[str], transform: Any, seed: int) -> None:
        self.source, self.labels, self.classes = source, list(labels), list(classes)
        self.transform, self.seed = transform, seed
        self.indices = list(range(len(self.labels)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        torch.default_generator.manual_seed(derive(self.seed, "sample", epoch, index))
        image, label = self.source[self.indices[index]]
        return self.transform(image), label

    def take(self, count: int) -> None:
        """Keep ``count`` images, in proportion from each class.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(self):
            raise ValueError(f"data.subset: {count} images asked for, there are {len(self)}")
        by_class = sorted(self.indices, key=lambda index: (self.labels[index], index))
        self.indices = sorted(by_class[number * len(by_class) // count] for number in range(count))


def load_images(config: DataConfig, seed: int) -> tuple[Images, Images]:
    """Training and test images.

    Raises:
        ValueError: a folder or file is missing, or the test images have a class that the training images lack.
    """
    from torchvision import datasets  # slow to import, and needed only here

    name, root = config.name, Path(config.root)
    train_transform, test_transform = transforms(config)
    if name == "digits":
        return _digits(config.size, train_transform, test_transform, seed)
    if name == "folder":
        folder = _unpacked(root) if root.is_file() else root
        train, test = (_image_folder(folder, splits) for splits in (("train",), ("test", "val")))
        strange = set(test.classes) - set(train.classes)
        if strange:
            raise ValueError(
                f"data.root: test class {sorted(strange)[0]!r} is not among the training classes of {folder}"
            )
        index = {train.classes.index(name): number for number, name in enumerate(test.classes)}
        back = {number: known for known, number in index.items()}
        test.samples = [(path, back[label]) for path, label in test.samples]
        pairs = [(split, [label for _, label in split.samples], train.classes) for split in (train, test)]
    else:
        try:
            if name == "cifar10":
                sets = [datasets.CIFAR10(root, train=flag, download=True) for flag in (True, False)]
                pairs = [(split, split.targets, split.classes) for split in sets]
            else:
                kind = {"stl10": datasets.STL10, "svhn": datasets.SVHN}[name]
                sets = [kind(root, split=split, download=True) for split in ("train", "test")]
                pairs = [(split, split.labels.tolist(), [str(c) for c in range(10)]) for split in sets]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"data.root: {name} is not in {root} and could not be downloaded: {error}") from error
    train_images = Images(*pairs[0], train_transform, seed)
    test_images = Images(*pairs[1], test_transform, seed)
    return train_images, test_images


def transforms(config: DataConfig) -> tuple[Any, Any]:
    """Transforms of training and test images; both end in a normalised float tensor of (3, size, size)."""
    from torchvision.transforms import v2

    size = config.size
    mean = MEAN.get(config.name, IMAGENET_MEAN)
    std = STD.get(config.name, IMAGENET_STD)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    square: list[Any] = [v2.Resize((size, size), antialias=True)]
    train: dict[str, list[Any]] = {
        "none": square,
        "shift": [*square, v2.RandomCrop(size, padding=2)],
        "crop_flip": [
            *square,
            v2.RandomCrop(size, padding=max(1, size // 8), padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
        ],
        "imagenet": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
    }
    test = square
    if config.augment == "imagenet":
        test = [v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*train[config.augment], *end]), v2.Compose([*test, *end])


def _digits(size: int, train_transform: Any, test_transform: Any, seed: int) -> tuple[Images, Images]:
    """scikit-learn's scans of handwritten digits, enlarged from 8 x 8 pixels."""

    def enlarged(scan: Scan) -> Image.Image:
        pixels = torch.from_numpy(scan / 16 * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy()).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)

    names = [str(digit) for digit in range(10)]
    train, test = (
        Images(
            [(enlarged(scan), digit) for scan, digit in scans], [digit for _, digit in scans], names, transform, seed
        )
        for scans, transform in zip(digit_scans(), (train_transform, test_transform), strict=True)
    )
    return train, test


def _image_folder(root: Path, splits: Sequence[str]) -> Any:
    from torchvision import datasets

    class Folder(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            classes = [name for name in super().find_classes(directory)[0] if not hidden(name)]
            if not classes:
                raise FileNotFoundError(f"no folder of a class in {directory}")
            return classes, {name: number for number, name in enumerate(classes)}

    for split in splits:
        if (root / split).is_dir():

            def is_image(path: str, folder: Path = root / split) -> bool:
                parts = Path(path).relative_to(folder).parts
                return Path(path).suffix.lower() in SUFFIXES and not any(map(hidden, parts))

            try:
                found = Folder(root / split, loader=open_image, is_valid_file=is_image)
                _check_headers([path for path, _ in found.samples])
                return found
            except FileNotFoundError as error:
                raise ValueError(f"data.root: {root / split}: {one_line(error)}") from error
    raise ValueError(f"data.root: {root} has no folder {' or '.join(splits)}/ with one folder per class")


HEADERS = 50_000
"""At most this many files are checked before training starts. More would delay it by minutes on a slow disk."""


def _check_headers(paths: Sequence[str]) -> None:
    """Find files that are not images, as far as their headers show, before training starts.

    Raises:
        ValueError: a file is not an image; the message names it.
    """
    for path in paths[:HEADERS]:
        with _named(path):
            pass


def open_image(path: str) -> Image.Image:
    """Read an image as RGB (see ``tasks.images.pixels_of``).

    Raises:
        ValueError: the file is damaged or not an image; the message names it.
    """
    with _named(path) as image:
        return Image.fromarray(pixels_of(image))


@contextmanager
def _named(path: str) -> Iterator[Image.Image]:
    """An opened image; whatever goes wrong with it becomes a ValueError that names the file."""
    try:
        with opened(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data.root: cannot read image {path}: {one_line(error)}") from error


def _unpacked(archive: Path) -> Path:
    """The folder in a tar file, unpacked into ``data/`` unless it is there already; it is complete or absent."""
    # Archives of the same name, or another version of one, get folders of their own.
    about = archive.stat()
    mark = hashlib.sha256(f"{archive.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:8]
    target = Path("data") / f"{archive.name.split('.')[0]}-{mark}"
    if not target.is_dir():
        print(f"unpacking {archive} into {target}", flush=True)
        try:
            with tarfile.open(archive) as tar, made_once(target) as whole:
                # Older patch releases of Python have no filters.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                content = whole.parent / "content"
                content.mkdir()
                tar.extractall(content)
                inner = list(content.iterdir())
                # Most archives hold one folder with everything in it, whose name does not matter.
                os.replace(inner[0] if len(inner) == 1 and inner[0].is_dir() else content, whole)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"data.root: {archive} cannot be unpacked: {one_line(error)}") from error
    return target
