"""Check annotation files before training, since MMDetection silently drops whatever does not fit."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Classes = tuple[str, ...]


Boxes = list[list[str]]
"""For each image the classes of its boxes."""


def coco_classes(file: Path, images: Path) -> tuple[Classes, Boxes]:
    """Check a COCO json; return its classes in the order in which MMDetection numbers them, and those of the boxes.

    Args:
        images: the folder that the file names are relative to.

    Raises:
        ValueError: the file is damaged or lists no images, or an image does not exist.
    """
    content = _json(file)
    kinds = {
        "images": {"id", "file_name", "width", "height"},
        "annotations": {"id", "image_id", "category_id", "bbox", "area"},
        "categories": {"id", "name"},
    }
    for kind, keys in kinds.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file}: not a COCO annotation file: it has no list {kind!r}")
        for number, entry in enumerate(entries):
            lacks = sorted(keys - set(entry)) if isinstance(entry, dict) else ["id"]
            if lacks:
                raise ValueError(f"{file}: {kind}[{number}] has no {lacks[0]!r}")
        if len({entry["id"] for entry in entries}) < len(entries):
            raise ValueError(f"{file}: two of its {kind} have the same id")
    if not content["images"]:
        raise ValueError(f"{file}: it has no images")
    for image in content["images"]:
        _check_image(images / image["file_name"], file)
    boxes: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        where = f"{file}: annotation {annotation['id']}"
        if annotation["image_id"] not in boxes:
            raise ValueError(f"{where} is of image {annotation['image_id']}, which is not among its images")
        if annotation["category_id"] not in names:
            raise ValueError(f"{where} is of category {annotation['category_id']}, which is not among its categories")
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
            raise ValueError(f"{where} has bbox {box}, not [x, y, width, height]")
        boxes[annotation["image_id"]].append(names[annotation["category_id"]])
    found = tuple(names.values())
    if len(set(found)) < len(found):
        raise ValueError(f"{file}: two of its categories have the same name")
    return found, list(boxes.values())


def voc_classes(file: Path, annotations: Path, images: Path) -> Boxes:
    """Check the XML files that a file in ImageSets/ lists; return the classes of their boxes.

    Args:
        annotations: the folder of the files ``NAME.xml``.
        images: the folder of the files ``NAME.jpg``, the only suffix that MMDetection looks for.

    Raises:
        ValueError: no images are listed, an image does not exist, or a file is missing or damaged.
    """
    boxes: Boxes = []
    names = _text(file).splitlines()
    if not names:
        raise ValueError(f"{file}: it lists no images")
    for name in names:
        xml = annotations / f"{name}.xml"
        if not xml.is_file():
            raise ValueError(f"{file}: it lists {name!r}, but there is no file {xml}")
        _check_image(images / f"{name}.jpg", xml)
        boxes.append([])
        try:
            root = ElementTree.parse(xml).getroot()
            for path in ("size/width", "size/height") if root.find("size") is not None else ():
                int(root.findtext(path, ""))
            for thing in root.findall("object"):
                for side in ("xmin", "ymin", "xmax", "ymax"):
                    int(float(thing.findtext(f"bndbox/{side}", "")))
                int(thing.findtext("difficult", "0"))
                if not thing.findtext("name"):
                    raise ValueError("an object without a name")
                boxes[-1].append(thing.findtext("name", ""))
        except (ElementTree.ParseError, ValueError, OverflowError) as error:
            raise ValueError(f"{xml}: cannot be read: {error}") from error
    return boxes


def check_classes(classes: Sequence[str], origin: str, found: Sequence[str], where: Path, *, ordered: bool) -> None:
    """Check that each of ``classes``, which come from ``origin``, is among those ``found`` in a file, and only once.

    Args:
        ordered: whether they must also be in the order in which they are found.

    Raises:
        ValueError: they are not; the message names the class and lists those that there are.
    """
    if len(set(classes)) < len(classes):
        raise ValueError(f"{origin}: a class is listed twice: {', '.join(classes)}")
    strange = [name for name in classes if name not in found]
    if strange:
        raise ValueError(
            f"{where}: it has no class {strange[0]!r}, which {origin} names; it has: {', '.join(found) or 'none'}"
        )
    order = [name for name in found if name in classes]
    if ordered and order != list(classes):
        raise ValueError(
            f"{where}: classes of {origin} are in another order; "
            f"MMDetection numbers them in this file's order: {', '.join(order)}"
        )


def left_out(classes: Sequence[str], origin: str, boxes: Boxes, where: Path, emptied: str) -> str:
    """What to say about boxes of other classes, which MMDetection drops; nothing if there are none.

    Args:
        emptied: what becomes of images that have no box left.
    """
    every = [name for own in boxes for name in own]
    others = [name for name in every if name not in classes]
    if not others:
        return ""
    empty = sum(bool(own) and not set(own) & set(classes) for own in boxes)
    return (
        f"{where}: {len(others)} of {len(every)} boxes are of classes that {origin} leaves out "
        f"({', '.join(sorted(set(others)))}) and are dropped; {empty} of {len(boxes)} images have no box left and "
        f"{emptied}"
    )


def _check_image(image: Path, named_by: Path) -> None:
    if not os.path.isfile(image):
        raise ValueError(f"{named_by}: it names image {image}, which does not exist")


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as json: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"{file}: cannot be read: {cause}") from error
