"""Whether images have the size that their annotations say, so that boxes lie where they were drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset
from PIL import UnidentifiedImageError

from engine.utilities.text import one_line
from tasks.images import opened, turns

AS_STORED = "color_ignore_orientation"
"""How mmcv calls reading pixels as they are stored, whatever EXIF data says of turning them."""


def check_sizes(dataset: Any) -> None:
    """Compare every image's size in its file's header with its annotations, before training starts.

    An image is read as a person sees it, turned as its EXIF data says. If the annotations have the size of the pixels
    as they are stored, their boxes were drawn on those, so the image is read without turning it.

    Raises:
        ValueError: an image has another size, either way, or is damaged. The message names it and both sizes.
    """
    for source in sources(dataset):
        stored = frozenset(path for path in map(_as_stored, _infos(source)) if path)
        steps = getattr(getattr(source, "pipeline", None), "transforms", [])
        for number, step in enumerate(steps):
            if stored and isinstance(step, LoadImageFromFile):
                steps[number] = LoadAsAnnotated(step, stored)


class LoadAsAnnotated:
    """Loads images as ``plain`` does, but those in ``stored`` without turning them."""

    def __init__(self, plain: LoadImageFromFile, stored: frozenset[str]) -> None:
        self.plain, self.stored = plain, stored
        self.unturned = copy.copy(plain)
        self.unturned.color_type = AS_STORED

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        load = self.unturned if results["img_path"] in self.stored else self.plain
        loaded: dict[str, Any] | None = load(results)
        return loaded


def sources(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets that a wrapper, such as a repetition or a concatenation, reads."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    for inner in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if inner is not None:
            yield from sources(inner)


def _infos(source: BaseDataset) -> Iterator[dict[str, Any]]:
    for number in range(len(source)):
        yield source.get_data_info(number)


def _as_stored(info: dict[str, Any]) -> str:
    """The path of an image that has to be read as it is stored; empty for every other."""
    path, said = str(info.get("img_path", "")), (info.get("width") or 0, info.get("height") or 0)
    try:
        with opened(path) as image:
            size = image.size
            seen = size[::-1] if turns(image) else size
    except FileNotFoundError:
        return ""  # not on this disk, or missing; whoever reads it says so
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"cannot load image {path}: {one_line(error)}") from error
    if not all(said) or said == seen:
        return ""
    if said == size:
        return path
    raise ValueError(
        f"{path}: has {seen[0]} x {seen[1]} px, its annotations say {said[0]} x {said[1]}, so its boxes would be "
        "misplaced; annotate this file, or restore the one that was annotated"
    )
