"""Silence remarks of MMDetection and its dependencies that are of no use here."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what pycocotools and MMDetection print; errors are still raised."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Also suppress warnings about optional packages that are missing and about a machine without a GPU."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
