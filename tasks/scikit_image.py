"""The pictures that scikit-image is installed with, divided once and for all into training and testing."""

from __future__ import annotations

from pathlib import Path

PICTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "photographs": {
        "train": ("astronaut.png", "rocket.jpg", "motorcycle_left.png"),
        "test": ("chelsea.png", "coffee.png"),
    },
    "textures": {
        "train": ("brick.png", "gravel.png", "hubble_deep_field.jpg"),
        "test": ("grass.png", "ihc.png"),
    },
}
"""File names by kind and split."""


def pictures(*names: str) -> list[Path]:
    """The files of these names in the installed package."""
    import skimage  # slow to import, and needed by few runs

    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in names]
