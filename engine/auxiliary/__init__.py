"""Auxiliary networks: one family a file behind one protocol and one registry.

To add one, write a file here with a subclass of ``AuxiliaryNetwork`` under ``@register("name")``; its
keyword arguments after ``task`` become the options of ``local.auxiliary`` in a config.
"""

from engine.auxiliary.protocol import AuxiliaryNetwork, build_auxiliary, known_families, register

__all__ = ["AuxiliaryNetwork", "build_auxiliary", "known_families", "register"]
