"""Auxiliary networks: one file per family, behind one protocol and one registry.

To add a family, write a file in this folder with a subclass of ``AuxiliaryNetwork`` under ``@register("name")``. The
parameters of its ``build`` other than chain, span, bank and task become the options of ``local.auxiliary`` in a config;
each of them needs an annotation. A class that lives elsewhere can be named in the config as ``module:Class``.
"""

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, build_auxiliary, known_families, register

__all__ = ["AuxiliaryNetwork", "build_auxiliary", "known_families", "register"]
