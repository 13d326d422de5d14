"""Files and folders that are either complete or absent, even if the process is killed while it writes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from engine.utilities.text import one_line

NAMELESS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors of writing that the system reports without the name of a file."""


class WriteError(ValueError):
    """A file or folder that cannot be written; ``reason`` is the system's."""

    def __init__(self, path: Path, reason: str, note: str = "") -> None:
        super().__init__(f"{path}: cannot be written: {reason}{note}")
        self.reason = reason


@contextmanager
def writing(path: Path, note: str = "") -> Iterator[None]:
    """A context that writes ``path``, and whose failures name it and the system's reason in one line.

    Libraries report a full disk each in their own way. An ``OSError`` about a file elsewhere, which the context only
    reads, passes unchanged.

    Args:
        note: what the error says after the reason.

    Raises:
        WriteError: a disk is full or read-only, a folder is missing or not permitted, or a file is in its place.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, WriteError) as error:
        # torch.save lets its own RuntimeError follow the OSError of the file that it was given.
        cause = error.__context__ if type(error) is RuntimeError else error
        if isinstance(cause, WriteError):
            reason = cause.reason
        elif isinstance(cause, OSError) and _concerns(cause, path):
            reason = _reason(cause, path)
        elif isinstance(cause, SafetensorError) and (match := re.search(r"I/O error: (.*?) \(os error", str(cause))):
            reason = match[1]
        else:
            raise
        raise WriteError(path, reason, note) from error


def _reason(error: OSError, path: Path) -> str:
    """The system's reason, with the folder that it is about if that is not ``path`` itself."""
    reason, named = error.strerror or one_line(error), error.filename
    return f"{reason}: {named}" if isinstance(named, str) and Path(named) in path.parents else reason


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is about ``path`` or its surroundings, as far as the error names a file."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return error.errno in NAMELESS
    named, own = (Path(os.path.abspath(os.fsdecode(each))) for each in (error.filename, path))
    return named in own.parents or own.parent in named.parents


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the ``with`` block ends, that file replaces ``path``.

    The folder is made if it does not exist. After an error or a kill, ``path`` is still what it was before.

    Raises:
        WriteError: as ``writing``.

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
    with writing(path, "; the earlier file is unchanged" if os.path.isfile(path) else ""):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            flush(partial)  # otherwise a power failure could leave the new name with the old, or no, content
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a file by way of ``replaced``.

    Raises:
        WriteError: as ``writing``.
    """
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
        WriteError: as ``writing``.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        try:
            # mkdtemp makes its folder with mode 0700, so that only its owner could read it.
            whole = temporary / target.name
            whole.mkdir()
            yield whole
            try:
                os.replace(whole, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
