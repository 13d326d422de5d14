"""The section ``local`` of another framework's config, as the engine's own."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

import jsonargparse

from engine.config import Config, LocalConfig, TrainConfig, parser_message, renamed_keys
from engine.utilities.text import did_you_mean

KEYS = ("blocks", "cut", "balance", "auxiliary", "recompute", "offload")
"""Of ``engine.config.LocalConfig``, those that make sense where another framework trains."""


def local_settings(
    local: Mapping[str, Any], elsewhere: Mapping[str, str], seed: int, others: Collection[str] = ()
) -> Config:
    """The engine's config with this ``local`` and seed.

    Args:
        elsewhere: keys that have another place in that framework, and which.
        others: keys that are not the engine's, and are left to the caller.

    Raises:
        ValueError: an unknown key (with the nearest known one), one that has its place elsewhere, or a value that will
            not do.
    """
    local = dict(local)
    renamed_keys(local)
    for key in local:
        if key in elsewhere:
            raise ValueError(f"local.{key}: {elsewhere[key]}")
        if key not in (known := (*KEYS, *others)):
            hint = did_you_mean(str(key), known) or f"; known: {', '.join(known)}"
            raise ValueError(f"local: unknown key {key!r}{hint}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LocalConfig, "local")
    try:
        parsed = parser.instantiate(
            parser.parse_object({"local": {key: value for key, value in local.items() if key in KEYS}})
        ).local
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(parser_message(error)) from error
    settings = Config(local=parsed, train=TrainConfig(seed=seed))
    settings.check()
    return settings
