"""Read the section ``local`` of another framework's config as the engine's own config."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

import jsonargparse

from engine.config import Config, LocalConfig, TrainConfig, renamed_keys
from engine.utilities.options import hints, parser_message
from engine.utilities.text import did_you_mean

KEYS = ("blocks", "cut", "balance", "auxiliary", "recompute", "offload")
"""The keys of ``engine.config.LocalConfig`` that make sense where another framework trains."""


def local_settings(
    local: Mapping[str, Any], elsewhere: Mapping[str, str], seed: int, others: Collection[str] = ()
) -> Config:
    """The engine's config with this ``local`` section and seed.

    Args:
        elsewhere: keys that the framework configures elsewhere, each with a hint where.
        others: keys that are not the engine's; they are allowed and left to the caller.

    Raises:
        ValueError: a key is unknown (the message names the nearest known one) or is configured elsewhere, or a value is
            not valid.
    """
    local = dict(local)
    renamed_keys(local)
    for key in local:
        if key in elsewhere:
            raise ValueError(f"local.{key}: {elsewhere[key]}")
        if key not in (known := (*KEYS, *others)):
            hint = did_you_mean(str(key), known) or f"; known: {', '.join(known)}"
            raise ValueError(f"local: unknown key {key!r}{hint}")
    for key in ("blocks", "balance"):
        if local.get("cut") and key in local:
            raise ValueError(f"local.{key}: has no effect beside local.cut; leave one of them out")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LocalConfig, "local")
    try:
        parsed = parser.instantiate(
            parser.parse_object({"local": {key: value for key, value in local.items() if key in KEYS}})
        ).local
    except (argparse.ArgumentError, TypeError) as error:
        given = {f"local.{key}": value for key, value in local.items()}
        raise ValueError(parser_message(error, hints(LocalConfig, "local."), given)) from error
    settings = Config(local=parsed, train=TrainConfig(seed=seed))
    settings.check()
    return settings
