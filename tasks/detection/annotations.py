"""Check annotation files before training, since MMDetection silently drops whatever does not fit."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Classes = tuple[str, ...]


def coco_classes(file: Path, images: Path, classes: Sequence[str] = (), origin: str = "data.classes") -> Classes:
    """Check a COCO json; return its classes in the order in which MMDetection numbers them.

    Args:
        images: the folder that the file names are relative to.
        classes: names that the file must have, in this order; ``origin`` says where they come from.

    Raises:
        ValueError: the file is damaged or lists no images, an image does not exist, or the classes do not match.
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
    known = {image["id"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        where = f"{file}: annotation {annotation['id']}"
        if annotation["image_id"] not in known:
            raise ValueError(f"{where} is of image {annotation['image_id']}, which is not among its images")
        if annotation["category_id"] not in names:
            raise ValueError(f"{where} is of category {annotation['category_id']}, which is not among its categories")
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
            raise ValueError(f"{where} has bbox {box}, not [x, y, width, height]")
    found = tuple(names.values())
    if len(set(found)) < len(found):
        raise ValueError(f"{file}: two of its categories have the same name")
    if classes:
        used = {names[annotation["category_id"]] for annotation in content["annotations"]}
        check_classes(classes, origin, found, used, file)
        order = [name for name in found if name in classes]
        if order != list(classes):
            raise ValueError(
                f"{file}: classes of {origin} are in another order; "
                f"MMDetection numbers them in this file's order: {', '.join(order)}"
            )
    return tuple(classes) or found


def voc_classes(file: Path, annotations: Path, images: Path) -> set[str]:
    """Check the XML files that a file in ImageSets/ lists; return the classes of their boxes.

    Args:
        annotations: the folder of the files ``NAME.xml``.
        images: the folder of the files ``NAME.jpg``, the only suffix that MMDetection looks for.

    Raises:
        ValueError: no images are listed, an image does not exist, or a file is missing or damaged.
    """
    found: set[str] = set()
    names = _text(file).splitlines()
    if not names:
        raise ValueError(f"{file}: it lists no images")
    for name in names:
        xml = annotations / f"{name}.xml"
        if not xml.is_file():
            raise ValueError(f"{file}: it lists {name!r}, but there is no file {xml}")
        _check_image(images / f"{name}.jpg", xml)
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
                found.add(thing.findtext("name", ""))
        except (ElementTree.ParseError, ValueError, OverflowError) as error:
            raise ValueError(f"{xml}: cannot be read: {error}") from error
    return found


def check_classes(classes: Sequence[str], origin: str, found: Sequence[str], used: set[str], where: Path) -> None:
    """Check that all ``classes`` are among those ``found``, and that they include all those ``used``.

    Raises:
        ValueError: one is missing; the message names it and lists the classes that there are.
    """
    if len(set(classes)) < len(classes):
        raise ValueError(f"{origin}: a class is listed twice: {', '.join(classes)}")
    strange = [name for name in classes if name not in found]
    if strange:
        raise ValueError(
            f"{where}: it has no class {strange[0]!r}, which {origin} names; it has: {', '.join(found) or 'none'}"
        )
    lacking = sorted(used - set(classes))
    if lacking:
        raise ValueError(f"{where}: it has boxes of class {lacking[0]!r}, which {origin} lacks; add it, or remove them")


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
