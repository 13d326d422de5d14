"""Files that are whole or not there, whenever a kill comes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write under another name, flush to disk, rename."""
    room = path.with_name(f".{path.name}.writing")
    room.write_text(text)
    flush(room)
    os.replace(room, path)


def check_writable(*paths: Path | None) -> None:
    """See, before any work, that files a user has named can be written.

    Raises:
        ValueError: a folder is missing or read-only, or the name is that of a folder.
    """
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path}: cannot be written: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written: {'it is a folder' if path.is_dir() else 'not permitted'}")


def write_named(path: Path, text: str) -> None:
    """Write a file that a user has named.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def flush(path: Path) -> None:
    """Have the system write a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def made_once(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` at the end of the block, or is removed after an error.

    Raises:
        ValueError: ``target`` is not there in the end, be it from here or from a faster run beside this one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        whole = room / target.name  # a temporary folder itself is its owner's alone
        whole.mkdir()
        yield whole
        with suppress(OSError):  # another run may have been faster
            os.replace(whole, target)
        if not target.is_dir():
            raise ValueError(f"{target} could not be made")
    finally:
        shutil.rmtree(room, ignore_errors=True)
