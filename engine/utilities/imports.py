"""Import objects that a config names as ``module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from engine.utilities.text import nearest, one_line


def import_named(name: str, key: str) -> Any:
    """Import the object ``module:name``; the module may also be a file in the current folder.

    Args:
        name: the module's dotted name, a colon, and the object's name.
        key: the config's key that holds this name, for the error.

    Raises:
        ValueError: the module cannot be imported, raises an error, or has no object of that name.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # at the end, so that a user's file cannot hide an installed module
    try:
        found = importlib.import_module(module)
        if attribute and not hasattr(found, attribute):
            close = nearest(attribute, [name for name in vars(found) if not name.startswith("_")])
            suggestion = f"; did you mean '{module}:{close}'?" if close else ""
            raise ImportError(f"module {module!r} has no {attribute!r}{suggestion}")
        return getattr(found, attribute)
    except Exception as error:  # the module may raise anything
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise ValueError(f"{key}: cannot import {name!r} (looked in {here} too): {kind}{one_line(error)}") from error
