"""Repaint every photograph in every style with a trained run, and write the pictures, a contact sheet and a report."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import at_least
from engine.utilities.console import console, progress_bar
from engine.utilities.files import check_writable, write_text, writing
from engine.utilities.text import did_you_mean
from tasks.images import Pixels
from tasks.run import open_run
from tasks.style_transfer.images import (
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

SHEET, REPORT = "sheet.png", "report.json"
ON_SHEET = 16
"""The contact sheet shows at most this many photographs and this many styles."""
STYLES_KEPT = 32
"""Paintings that stay in memory; if there are more, they are read again for every photograph."""
TILE = 1024
"""Side of a tile in pixels, unless the user gives one."""
WHITE = np.full((1, 1, 3), 255, np.uint8)
"""Placeholder on the sheet for an artist without a picture."""


@dataclass(frozen=True)
class Options:
    """What a user asks for; None leaves a choice to the run.

    Args:
        content: a photograph, or a folder of photographs.
        style: a painting or a folder of paintings, or names of artists with commas between them.
        run: folder of the run that paints.
        out: folder for the pictures; it is made if it does not exist.
        alpha: strength of the style, from 0 to 1.
        seed: of the noise that pictures by artists start from.
        keep_colour: keep the photographs' colours.
        tile: side in pixels of the tiles in which larger photographs are painted.
        style_size: pixels of the paintings' shorter side.
        content_size: pixels of the photographs' shorter side.
    """

    content: Path
    style: str
    run: Path
    out: Path
    alpha: float | None = None
    seed: int | None = None
    keep_colour: bool = False
    tile: int | None = None
    style_size: int | None = None
    content_size: int | None = None


def repaint(options: Options) -> list[dict[str, Any]]:
    """Write OUT/CONTENT_STYLE.png for every pair, OUT/sheet.png and OUT/report.json; return the report's pictures.

    Whatever can be wrong with the options and the files is found before anything is painted.

    Raises:
        ValueError: an option is wrong, an image or the run cannot be read, or a file cannot be written.
    """
    if options.alpha is not None and not 0 <= options.alpha <= 1:
        raise ValueError(f"--alpha: {options.alpha} is not from 0 to 1")
    sizes = (
        ("--tile", options.tile, LEAST_SIDE),
        ("--style-size", options.style_size, LEAST_SIDE),
        ("--content-size", options.content_size, 1),
    )
    at_least(*((key, size, least) for key, size, least in sizes if size is not None))
    contents = _files("--content", options.content)
    _check_out("--content", options.content, options.out)
    _check_sizes("--content-size", options.content_size, contents)

    run = open_run(options.run)
    painter = run.task.painter(run.chain, run.predict)
    if painter is None:
        raise ValueError(f"--run: {options.run} is a run of {run.task.name}, which cannot stylize")
    alpha: float = painter.alpha if options.alpha is None else options.alpha
    styles = _styles(painter, options, alpha, run.device)
    targets = _targets(options.out, contents, styles.all)
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    check_writable(*targets.values(), options.out / SHEET, options.out / REPORT)
    pictures = _paint_all(styles, contents, targets, options)
    report = {
        "run": str(run.folder),
        "step": run.step,
        "alpha": alpha,
        "keep_colour": options.keep_colour,
        **styles.settings,
        "device": str(run.device),
        "pictures": pictures,
    }
    write_text(options.out / REPORT, json.dumps(report, indent=2) + "\n")
    return pictures


class Styles(Protocol):
    """The styles that a user has asked for, and how a run paints in them."""

    @property
    def kind(self) -> str:
        """What the report calls a style."""
        ...

    @property
    def all(self) -> Sequence[Path | str]: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the report says about this way of painting."""
        ...

    def prepare(self, style: Any) -> None:
        """Read what painting in a style needs; the time that this takes is not counted."""

    def paint(self, image: Pixels, content: Path, style: Any) -> Pixels:
        """The photograph ``image``, which is read from ``content``, in a style.

        Raises:
            ValueError: it cannot be painted.
        """
        ...

    def sample(self, style: Any) -> Pixels | None:
        """A picture that shows the style, if there is one."""


class PaintingStyles:
    """Styles of paintings that the network looks at.

    Raises:
        ValueError: an option or a painting is wrong.
    """

    kind = "style"

    def __init__(self, painter: Painter, options: Options, alpha: float, device: torch.device) -> None:
        if options.seed is not None:
            raise ValueError(
                f"--seed: {options.seed} has no effect: {options.run} paints without randomness; leave it out"
            )
        self.painter, self.options, self.alpha, self.device = painter, options, alpha, device
        self.tile = options.tile or TILE
        self.settings = {"tile": self.tile}
        place = Path(options.style)
        if not place.exists():
            raise ValueError(
                f"--style: there is no file or folder {place}{_near(place)}; {options.run} paints in the style "
                "of a painting: give one, or a folder of them"
            )
        self.all = _files("--style", place)
        _check_out("--style", place, options.out)
        self.size = options.style_size or painter.style_size
        _check_sizes("--style-size", self.size, self.all)
        self._painting = functools.lru_cache(STYLES_KEPT)(self._read)

    def prepare(self, style: Path) -> None:
        self._painting(style)

    def paint(self, image: Pixels, content: Path, style: Path) -> Pixels:
        painting = self._painting(style)
        try:
            return stylize(
                self.painter,
                image,
                painting,
                alpha=self.alpha,
                keep_colour=self.options.keep_colour,
                tile=self.tile,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--tile: {self.tile} is too much for the memory of {self.device}; take less") from error

    def sample(self, style: Path) -> Pixels:
        return as_pixels(self._painting(style)[0])

    def _read(self, path: Path) -> Tensor:
        return resized(as_tensor(read_image(path)), self.size)[None].to(self.device)


class ArtistStyles:
    """Styles of artists that the network has learnt.

    Raises:
        ValueError: an option is wrong, or an artist is unknown.
    """

    kind = "artist"

    def __init__(self, painter: OfArtists, options: Options, alpha: float, device: torch.device) -> None:
        for key, size in (("--tile", options.tile), ("--style-size", options.style_size)):
            if size is not None:
                raise ValueError(
                    f"{key}: {size} has no effect: {options.run} paints whole pictures, by artist; leave it out"
                )
        self.painter, self.options, self.alpha, self.device = painter, options, alpha, device
        self.seed = 0 if options.seed is None else options.seed
        self.settings = {"strength": alpha, "seed": self.seed}
        self.all = list(dict.fromkeys(name.strip() for name in options.style.split(",")))
        for artist in self.all:
            if artist not in painter.artists:
                hint, known = did_you_mean(artist, painter.artists), ", ".join(sorted(painter.artists))
                raise ValueError(
                    f"--style: {artist!r} is not an artist that {options.run} knows{hint}; they are: {known}"
                )
        self._samples = {artist: painter.work(artist) for artist in self.all[:ON_SHEET]}
        unseen = [artist for artist, work in self._samples.items() if work is None]
        if unseen:
            console.print(f"{SHEET} shows no work by {', '.join(unseen)}: the run's collections have none here")

    def prepare(self, style: str) -> None:
        pass

    def paint(self, image: Pixels, content: Path, style: str) -> Pixels:
        try:
            return paint_whole(
                self.painter,
                image,
                style,
                name=content.stem,
                device=self.device,
                alpha=self.alpha,
                seed=self.seed,
                keep_colour=self.options.keep_colour,
            )
        except torch.OutOfMemoryError as error:
            height, width = image.shape[:2]
            raise ValueError(
                f"--content-size: {width} x {height} px are too much for the memory of {self.device}; take less than "
                f"{min(height, width)}"
            ) from error

    def sample(self, style: str) -> Pixels | None:
        return self._samples[style]


def _styles(painter: Any, options: Options, alpha: float, device: torch.device) -> Styles:
    if hasattr(painter, "artists"):
        return ArtistStyles(painter, options, alpha, device)
    return PaintingStyles(painter, options, alpha, device)


def _paint_all(
    styles: Styles, contents: Sequence[Path], targets: Mapping[tuple[Path, Any], Path], options: Options
) -> list[dict[str, Any]]:
    """Write every picture and the contact sheet; return what the report says about each picture."""

    @functools.lru_cache(1)  # the styles of one photograph come one after another
    def photograph(path: Path) -> Pixels:
        image = read_image(path)
        return as_pixels(resized(as_tensor(image), options.content_size)) if options.content_size else image

    small: dict[tuple[int, int], Pixels] = {}  # row -1 has the styles, column -1 the photographs
    report = []
    with progress_bar() as bar:
        shown = bar.add_task("stylize", total=len(targets))
        for (i, content), (j, style) in product(enumerate(contents), enumerate(styles.all)):
            image, target = photograph(content), targets[content, style]
            styles.prepare(style)
            start = time.perf_counter()
            picture = styles.paint(image, content, style)
            seconds = time.perf_counter() - start
            write_image(target, picture)
            height, width = picture.shape[:2]
            report.append(
                {
                    "content": str(content),
                    styles.kind: str(style),
                    "file": target.name,
                    "width": width,
                    "height": height,
                    "seconds": seconds,
                }
            )
            # Shrunk at once, so that the sheet keeps no picture in full size.
            for place, each in (((i, -1), image), ((-1, j), None), ((i, j), picture)):
                if max(place) < ON_SHEET and place not in small:
                    square = styles.sample(style) if each is None else each
                    small[place] = fitted(WHITE if square is None else square, SIDE)
            bar.advance(shown)
    sheet = contact_sheet(
        [small[i, -1] for i in range(min(len(contents), ON_SHEET))],
        [small[-1, j] for j in range(min(len(styles.all), ON_SHEET))],
        {place: each for place, each in small.items() if min(place) >= 0},
    )
    write_image(options.out / SHEET, sheet)
    return report


def _files(key: str, place: Path) -> list[Path]:
    """The file, or the images of the folder, that ``key`` names."""
    if place.is_dir():
        return find_images(key, [place])
    if not place.is_file():
        raise ValueError(f"{key}: there is no file or folder {place}{_near(place)}")
    return [place]


def _near(place: Path) -> str:
    """A suggestion for a path that does not exist: the most similar name in its folder, if there is any."""
    return did_you_mean(place.name, [each.name for each in place.parent.glob("*")])


def _targets(out: Path, contents: Sequence[Path], styles: Sequence[Path | str]) -> dict[tuple[Path, Any], Path]:
    """Where the picture of each (content, style) goes.

    Raises:
        ValueError: two pictures would have the same name, or an input would be overwritten.
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
            # Names may hold the underscore that joins them: a_b with c, and a with b_c.
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
