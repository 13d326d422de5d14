"""Objects that a config names as ``module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_named(name: str, key: str) -> Any:
    """The object ``module:name``; the module may also lie in the current folder.

    Args:
        key: of the config, that has the name.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the user's own files lie where the command is given
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: cannot import {name!r} (looked in {here} too): {error}") from error
