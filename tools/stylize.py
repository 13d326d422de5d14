"""Repaint: python tools/stylize.py --content FILE|FOLDER --style FILE|FOLDER --run runs/NAME --out FOLDER [...]"""

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from engine.config import ToolParser, at_least, run_tool
from engine.files import write_named
from engine.log import progress_bar
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
from tasks.style_transfer.stylize import LEAST_SIDE, Painter, stylize

ABOUT = """
Paint every photograph in the style of every painting, with the newest complete checkpoint of a run.

Writes OUT/CONTENT_STYLE.png; OUT/sheet.png, which shows the first of them; OUT/report.json, which lists them all.
"""
SHEET = "sheet.png"
ON_SHEET = 16
"""Photographs, and paintings, on the contact sheet, at most."""
STYLES_KEPT = 32
"""Paintings that stay in memory; more are read again for every photograph."""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("--content", required=True, type=Path, help="photograph, or folder of photographs")
    parser.add_argument("--style", required=True, type=Path, help="painting, or folder of paintings")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures, made where there is none")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the style, from 0 to 1; else 1")
    parser.add_argument("--keep-colour", action="store_true", help="keep the photographs' colours")
    parser.add_argument("--tile", type=int, default=1024, help="paint in tiles of this side what is larger; else 1024")
    parser.add_argument("--style-size", type=int, help="pixels of paintings' shorter side; else what the network wants")
    parser.add_argument("--content-size", type=int, help="pixels of photographs' shorter side; else as they are")
    given = parser.parse_args(list(argv))
    if not 0 <= given.alpha <= 1:
        raise ValueError(f"--alpha: {given.alpha} is not from 0 to 1")
    at_least(("--tile", given.tile, LEAST_SIDE))
    least = {"--style-size": LEAST_SIDE, "--content-size": 1}
    at_least(*((key, size, least[key]) for key, size in _wanted_sizes(given).items() if size is not None))
    contents, styles = _files("--content", given.content), _files("--style", given.style)
    for key, place in (("--content", given.content), ("--style", given.style)):
        if place.is_dir() and given.out.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"--out: {given.out} is in {key}, whose images would then be repainted; choose another")
    targets = _targets(given.out, contents, styles)
    sizes = {path: image_size(path) for path in (*contents, *styles)}

    run = open_run(given.run)
    if not hasattr(run.task, "painter"):
        raise ValueError(f"--run: {given.run} is a run of {run.task.name}, which cannot stylize")
    painter: Painter = run.task.painter(run)
    given.style_size = given.style_size or painter.style_size
    for (key, shorter), paths in zip(_wanted_sizes(given).items(), (styles, contents), strict=True):
        _check_sizes(key, shorter, {path: sizes[path] for path in paths})
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {given.out} cannot be made: {error.strerror}") from error
    pictures = paint(painter, contents, styles, targets, run.device, given)
    report = {
        "run": str(run.folder),
        "step": run.step,
        "alpha": given.alpha,
        "keep_colour": given.keep_colour,
        "tile": given.tile,
        "device": str(run.device),
        "pictures": pictures,
    }
    write_named(given.out / "report.json", json.dumps(report, indent=2) + "\n")
    seconds = sum(picture["seconds"] for picture in pictures) / len(pictures)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {given.out}, {seconds:.2f} s each")


def paint(
    painter: Painter,
    contents: Sequence[Path],
    styles: Sequence[Path],
    targets: Mapping[tuple[Path, Path], Path],
    device: torch.device,
    given: Namespace,
) -> list[dict[str, Any]]:
    """Write every picture and the contact sheet; what the report says of each picture."""

    @functools.lru_cache(1)  # all styles of a photograph come one after another
    def photograph(path: Path) -> Pixels:
        image = read_image(path)
        return as_pixels(resized(as_tensor(image), given.content_size)) if given.content_size else image

    @functools.lru_cache(STYLES_KEPT)
    def painting(path: Path) -> Tensor:
        return resized(as_tensor(read_image(path)), given.style_size)[None].to(device)

    small: dict[tuple[int, int], Pixels] = {}  # row -1 has the paintings, column -1 the photographs
    report = []
    with progress_bar() as bar:
        shown = bar.add_task("stylize", total=len(targets))
        for (i, content), (j, style) in product(enumerate(contents), enumerate(styles)):
            image, like, target = photograph(content), painting(style), targets[content, style]
            start = time.perf_counter()
            try:
                picture = stylize(
                    painter, image, like, alpha=given.alpha, keep_colour=given.keep_colour, tile=given.tile
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(f"--tile: {given.tile} is too much for the memory of {device}; take less") from error
            seconds = time.perf_counter() - start
            write_image(target, picture)
            height, width = picture.shape[:2]
            report.append(
                {
                    "content": str(content),
                    "style": str(style),
                    "file": target.name,
                    "width": width,
                    "height": height,
                    "seconds": seconds,
                }
            )
            for place, each in (((i, -1), image), ((-1, j), as_pixels(like[0])), ((i, j), picture)):
                if max(place) < ON_SHEET and place not in small:
                    small[place] = fitted(each, SIDE)
            bar.advance(shown)
    sheet = contact_sheet(
        [small[i, -1] for i in range(min(len(contents), ON_SHEET))],
        [small[-1, j] for j in range(min(len(styles), ON_SHEET))],
        {place: each for place, each in small.items() if min(place) >= 0},
    )
    write_image(given.out / SHEET, sheet)
    return report


def _wanted_sizes(given: Namespace) -> dict[str, int | None]:
    return {"--style-size": given.style_size, "--content-size": given.content_size}


def _files(key: str, place: Path) -> list[Path]:
    """The file, or the images of the folder, that ``key`` names."""
    if place.is_dir():
        return find_images(key, [place])
    if not place.is_file():
        raise ValueError(f"{key}: there is no file or folder {place}")
    return [place]


def _targets(out: Path, contents: Sequence[Path], styles: Sequence[Path]) -> dict[tuple[Path, Path], Path]:
    """Where the picture of each (content, style) goes.

    Raises:
        ValueError: two would have one name, or an input would be overwritten.
    """
    for key, paths in (("--content", contents), ("--style", styles)):
        stems: dict[str, Path] = {}
        for path in paths:
            if path.stem in stems:
                raise ValueError(f"{key}: {stems[path.stem]} and {path} have the same name; rename one of them")
            stems[path.stem] = path
    targets: dict[tuple[Path, Path], Path] = {}
    owners: dict[Path, tuple[Path, Path]] = {}
    for pair in product(contents, styles):
        content, style = pair
        target = targets[pair] = out / f"{content.stem}_{style.stem}.png"
        if target in owners:
            (one, like) = owners[target]
            raise ValueError(
                f"{one} in the style of {like}, and {content} in that of {style}, would both be {target.name}; "
                "rename one of them"
            )
        owners[target] = pair
    inputs = {path.resolve() for path in (*contents, *styles)}
    for target in (*owners, out / SHEET):
        if target.resolve() in inputs:
            raise ValueError(f"--out: {target} is read and would be written; choose another folder")
    return targets


def _check_sizes(key: str, shorter: int | None, sizes: Mapping[Path, tuple[int, int]]) -> None:
    for path, (width, height) in sizes.items():
        try:
            resized_sides(height, width, shorter or min(height, width))
        except ValueError as error:
            raise ValueError(f"{key}: {path}: {error}") from error


if __name__ == "__main__":
    run_tool(main)
