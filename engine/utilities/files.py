"""Files and folders that are complete or not there, whenever a process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; at the end of the block that file becomes ``path``.

    After an error, and after a kill, ``path`` is what it was before.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replaced(folder / "notes.txt") as partial:
        ...     _ = partial.write_text("complete")
        >>> (folder / "notes.txt").read_text()
        'complete'
    """
    partial = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    with replaced(path) as partial:
        partial.write_text(text)


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
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        whole = temporary / target.name  # a temporary folder itself is its owner's alone
        whole.mkdir()
        yield whole
        with suppress(OSError):  # another run may have been faster
            os.replace(whole, target)
        if not target.is_dir():
            raise ValueError(f"{target} could not be made")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
