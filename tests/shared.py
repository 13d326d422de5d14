"""Real data and weights beside the project, where they exist."""

from __future__ import annotations

import functools
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[2] / "shared"))


def needs_shared(path: str) -> pytest.MarkDecorator:
    """Skip a test, and say why, where ``shared/path`` is not there."""
    return pytest.mark.skipif(not (SHARED / path).exists(), reason=f"{SHARED / path} is not here")


@functools.cache
def CIFAR10() -> Path:
    """The test images and 10 a class of the training images, unpacked once per run of the tests."""
    room = Path(tempfile.mkdtemp(prefix="cifar10-"))
    with tarfile.open(SHARED / "data/cifar10.tar.xz") as tar:
        wanted = [
            member
            for member in tar
            if "/test/" in member.name or ("/train/" in member.name and int(Path(member.name).stem) < 10)
            if member.isfile()
        ]
        tar.extractall(room, members=wanted, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return room / "cifar10"
