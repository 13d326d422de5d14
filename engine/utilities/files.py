"""Files and folders that are either complete or absent, even if the process is killed while it writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the ``with`` block ends, that file replaces ``path``.

    After an error or a kill, ``path`` is still what it was before.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replaced(folder / "notes.txt") as partial:
        ...     _ = partial.write_text("complete")
        >>> (folder / "notes.txt").read_text()
        'complete'
    """
    # In the same folder, because os.replace is atomic only within one file system. The suffix stays, because some
    # writers choose their format by it.
    partial = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield partial
        flush(partial)  # otherwise a power failure could leave the new name with the old, or no, content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a file by way of ``replaced``."""
    with replaced(path) as partial:
        partial.write_text(text)


def check_writable(*paths: Path | None) -> None:
    """Check, before any work begins, that the files a user named can be written; None stands for no file.

    Raises:
        ValueError: the parent folder is missing or read-only, or the path is a folder.
    """
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path}: cannot be written: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written: {'it is a folder' if path.is_dir() else 'not permitted'}")


def write_named(path: Path, text: str) -> None:
    """Write ``text`` to a file that a user named.

    Raises:
        ValueError: the file cannot be written. The message names it and the reason.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def flush(path: Path) -> None:
    """Make the system write a file's content, or a folder's entries, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def made_once(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes ``target`` when the ``with`` block ends, and is removed after an error.

    Several processes may do this for the same ``target`` at once: the first to finish wins, and the others drop theirs.

    Raises:
        ValueError: ``target`` cannot be written, or does not exist at the end, neither from this process nor from
            another.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    except OSError as error:
        raise ValueError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        whole = temporary / target.name  # mkdtemp makes its folder with mode 0700, so that only its owner could read it
        whole.mkdir()
        yield whole
        with suppress(OSError):  # os.replace fails if another process was faster and ``target`` is not empty
            os.replace(whole, target)
        if not target.is_dir():
            raise ValueError(f"{target} could not be made")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
