"""Repaint: python tools/stylize.py --content FILE|FOLDER --style FILE|FOLDER|ARTIST --run runs/NAME --out OUT [...]"""

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from engine.config import at_least
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.console import progress_bar
from engine.utilities.files import write_named
from tasks.run import open_run
from tasks.style_transfer.images import (
    Pixels,
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
from tasks.style_transfer.sheet import SIDE, contact_sheet
from tasks.style_transfer.stylize import LEAST_SIDE, OfArtists, Painter, paint_whole, stylize

ABOUT = """
Paint every photograph in the style of every painting, with the newest complete checkpoint of a run. A run that learnt
artists' styles takes their names in the paintings' stead.

Writes OUT/CONTENT_STYLE.png; OUT/sheet.png, which shows the first of them; OUT/report.json, which lists them all.
"""
SHEET = "sheet.png"
ON_SHEET = 16
"""Photographs, and paintings, on the contact sheet, at most."""
STYLES_KEPT = 32
"""Paintings that stay in memory; more are read again for every photograph."""
TILE = 1024
"""Pixels of a tile's side, unless asked otherwise."""
WHITE = np.full((1, 1, 3), 255, np.uint8)
"""Shown of an artist of whom there is no picture."""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("--content", required=True, type=Path, help="photograph, or folder of photographs")
    parser.add_argument("--style", required=True, help="painting, or folder of paintings; or artists: monet,cezanne")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures, made where there is none")
    parser.add_argument(
        "--alpha", "--strength", type=float, help="strength of the style, from 0 to 1; else 1, of an artist's the run's"
    )
    parser.add_argument("--seed", type=int, help="of the noise that artists' pictures start from; else 0")
    parser.add_argument("--keep-colour", action="store_true", help="keep the photographs' colours")
    parser.add_argument(
        "--tile", type=int, help=f"paint in tiles of this side what is larger; else {TILE}. Artists' are painted whole"
    )
    parser.add_argument("--style-size", type=int, help="pixels of paintings' shorter side; else what the network wants")
    parser.add_argument("--content-size", type=int, help="pixels of photographs' shorter side; else as they are")
    given = parser.parse_args(list(argv))
    if given.alpha is not None and not 0 <= given.alpha <= 1:
        raise ValueError(f"--alpha: {given.alpha} is not from 0 to 1")
    least = {"tile": LEAST_SIDE, "style_size": LEAST_SIDE, "content_size": 1}
    asked = [(key, getattr(given, key)) for key in least if getattr(given, key) is not None]
    at_least(*((f"--{key.replace('_', '-')}", size, least[key]) for key, size in asked))
    contents = _files("--content", given.content)
    _check_out("--content", given.content, given.out)
    _check_sizes("--content-size", given.content_size, contents)

    run = open_run(given.run)
    painter = run.task.painter(run.chain, run.predict)
    if painter is None:
        raise ValueError(f"--run: {given.run} is a run of {run.task.name}, which cannot stylize")
    if given.alpha is None:
        given.alpha = painter.alpha
    kind = Artists if hasattr(painter, "artists") else Paintings
    manner: Manner = kind(painter, given, run.device)
    targets = _targets(given.out, contents, manner.styles)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {given.out} cannot be made: {error.strerror}") from error
    pictures = paint(manner, contents, targets, given)
    report = {
        "run": str(run.folder),
        "step": run.step,
        "alpha": given.alpha,
        "keep_colour": given.keep_colour,
        **manner.settings,
        "device": str(run.device),
        "pictures": pictures,
    }
    write_named(given.out / "report.json", json.dumps(report, indent=2) + "\n")
    seconds = sum(picture["seconds"] for picture in pictures) / len(pictures)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {given.out}, {seconds:.2f} s each")


class Manner(Protocol):
    """How a run paints, and in which styles."""

    named: str
    """What a style is called in the report."""
    styles: Sequence[Path | str]
    settings: Mapping[str, Any]
    """What the report says beside."""

    def ready(self, style: Any) -> None:
        """Read what painting in a style takes."""

    def picture(self, image: Pixels, content: Path, style: Any) -> Pixels: ...

    def sample(self, style: Any) -> Pixels | None:
        """To show a style by, if there is something."""


class Paintings:
    """In the styles of paintings that the network looks at.

    Raises:
        ValueError: an option is wrong, or a painting.
    """

    named = "style"

    def __init__(self, painter: Painter, given: Namespace, device: torch.device) -> None:
        if given.seed is not None:
            raise ValueError(f"--seed: {given.seed} changes nothing: {given.run} paints without chance; leave it out")
        self.painter, self.given, self.device = painter, given, device
        self.tile = given.tile or TILE
        self.settings = {"tile": self.tile}
        place = Path(given.style)
        self.styles = _files("--style", place)
        _check_out("--style", place, given.out)
        self.size = given.style_size or painter.style_size
        _check_sizes("--style-size", self.size, self.styles)
        self.painting = functools.lru_cache(STYLES_KEPT)(self._read)

    def ready(self, style: Path) -> None:
        self.painting(style)

    def picture(self, image: Pixels, content: Path, style: Path) -> Pixels:
        wanted = {"alpha": self.given.alpha, "keep_colour": self.given.keep_colour, "tile": self.tile}
        try:
            return stylize(self.painter, image, self.painting(style), **wanted)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--tile: {self.tile} is too much for the memory of {self.device}; take less") from error

    def sample(self, style: Path) -> Pixels:
        return as_pixels(self.painting(style)[0])

    def _read(self, path: Path) -> Tensor:
        return resized(as_tensor(read_image(path)), self.size)[None].to(self.device)


class Artists:
    """In the styles of artists that the network has learnt.

    Raises:
        ValueError: an option is wrong, or an artist is unknown.
    """

    named = "artist"

    def __init__(self, painter: OfArtists, given: Namespace, device: torch.device) -> None:
        for key, size in (("--tile", given.tile), ("--style-size", given.style_size)):
            if size is not None:
                raise ValueError(f"{key}: {size} changes nothing: {given.run} paints wholes, of artists; leave it out")
        self.painter, self.given, self.device = painter, given, device
        self.seed = 0 if given.seed is None else given.seed
        self.settings = {"strength": given.alpha, "seed": self.seed}
        self.styles = list(dict.fromkeys(name.strip() for name in given.style.split(",")))
        for artist in self.styles:
            if artist not in painter.artists:
                known = ", ".join(sorted(painter.artists))
                raise ValueError(f"--style: {artist!r} is no artist that {given.run} knows; they are: {known}")
        self.samples = {artist: painter.work(artist) for artist in self.styles[:ON_SHEET]}

    def ready(self, style: str) -> None:
        pass

    def picture(self, image: Pixels, content: Path, style: str) -> Pixels:
        wanted = {"alpha": self.given.alpha, "seed": self.seed, "keep_colour": self.given.keep_colour}
        try:
            return paint_whole(self.painter, image, style, name=content.stem, device=self.device, **wanted)
        except torch.OutOfMemoryError as error:
            height, width = image.shape[:2]
            raise ValueError(
                f"--content-size: {width} x {height} px are too much for the memory of {self.device}; take less than "
                f"{min(height, width)}"
            ) from error

    def sample(self, style: str) -> Pixels | None:
        return self.samples[style]


def paint(
    manner: Manner, contents: Sequence[Path], targets: Mapping[tuple[Path, Any], Path], given: Namespace
) -> list[dict[str, Any]]:
    """Write every picture and the contact sheet; what the report says of each picture."""

    @functools.lru_cache(1)  # all styles of a photograph come one after another
    def photograph(path: Path) -> Pixels:
        image = read_image(path)
        return as_pixels(resized(as_tensor(image), given.content_size)) if given.content_size else image

    small: dict[tuple[int, int], Pixels] = {}  # row -1 has the styles, column -1 the photographs
    report = []
    with progress_bar() as bar:
        shown = bar.add_task("stylize", total=len(targets))
        for (i, content), (j, style) in product(enumerate(contents), enumerate(manner.styles)):
            image, target = photograph(content), targets[content, style]
            manner.ready(style)
            start = time.perf_counter()
            picture = manner.picture(image, content, style)
            seconds = time.perf_counter() - start
            write_image(target, picture)
            height, width = picture.shape[:2]
            report.append(
                {
                    "content": str(content),
                    manner.named: str(style),
                    "file": target.name,
                    "width": width,
                    "height": height,
                    "seconds": seconds,
                }
            )
            for place, each in (((i, -1), image), ((-1, j), None), ((i, j), picture)):
                if max(place) < ON_SHEET and place not in small:
                    square = manner.sample(style) if each is None else each
                    small[place] = fitted(WHITE if square is None else square, SIDE)
            bar.advance(shown)
    sheet = contact_sheet(
        [small[i, -1] for i in range(min(len(contents), ON_SHEET))],
        [small[-1, j] for j in range(min(len(manner.styles), ON_SHEET))],
        {place: each for place, each in small.items() if min(place) >= 0},
    )
    write_image(given.out / SHEET, sheet)
    return report


def _files(key: str, place: Path) -> list[Path]:
    """The file, or the images of the folder, that ``key`` names."""
    if place.is_dir():
        return find_images(key, [place])
    if not place.is_file():
        raise ValueError(f"{key}: there is no file or folder {place}")
    return [place]


def _targets(out: Path, contents: Sequence[Path], styles: Sequence[Path | str]) -> dict[tuple[Path, Any], Path]:
    """Where the picture of each (content, style) goes.

    Raises:
        ValueError: two would have one name, or an input would be overwritten.
    """
    for key, group in (("--content", contents), ("--style", styles)):
        stems: dict[str, Path | str] = {}
        for each in group:
            if _stem(each) in stems:
                raise ValueError(f"{key}: {stems[_stem(each)]} and {each} have the same name; rename one of them")
            stems[_stem(each)] = each
    targets: dict[tuple[Path, Any], Path] = {}
    owners: dict[Path, tuple[Path, Any]] = {}
    for pair in product(contents, styles):
        content, style = pair
        target = targets[pair] = out / f"{_stem(content)}_{_stem(style)}.png"
        if target in owners:
            (one, like) = owners[target]
            raise ValueError(
                f"{one} in the style of {like}, and {content} in that of {style}, would both be {target.name}; "
                "rename one of them"
            )
        owners[target] = pair
    inputs = {path.resolve() for path in (*contents, *styles) if isinstance(path, Path)}
    for target in (*owners, out / SHEET):
        if target.resolve() in inputs:
            raise ValueError(f"--out: {target} is read and would be written; choose another folder")
    return targets


def _stem(each: Path | str) -> str:
    return each.stem if isinstance(each, Path) else each


def _check_out(key: str, place: Path, out: Path) -> None:
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise ValueError(f"--out: {out} is in {key}, whose images would then be repainted; choose another")


def _check_sizes(key: str, shorter: int | None, paths: Sequence[Path]) -> None:
    for path in paths:
        width, height = image_size(path)
        try:
            resized_sides(height, width, shorter or min(height, width))
        except ValueError as error:
            raise ValueError(f"{key}: {path}: {error}") from error


if __name__ == "__main__":
    run_tool(main)
