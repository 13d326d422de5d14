"""A small checkpoint in diffusers' layout, made once for all tests of pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest

import tasks  # noqa: F401 (mends torchvision before diffusers imports it)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny, untrained Stable Diffusion; tests that change it copy it."""
    from tasks.style_transfer.diffusion.base import Base, quiet

    folder = tmp_path_factory.mktemp("base") / "tiny"
    base = Base("tiny")
    with quiet():
        base.save(folder, base.unet(), base.vae())
    return folder
