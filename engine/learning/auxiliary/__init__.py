"""Auxiliary networks: one family a file behind one protocol and one registry.

To add one, write a file here with a subclass of ``AuxiliaryNetwork`` under ``@register("name")``; the annotated
parameters of its ``build`` beside chain, span, bank and task become the options of ``local.auxiliary`` in a config. (Or
write the class anywhere, and name it in the config as ``module:Class``.)
"""

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, build_auxiliary, known_families, register

__all__ = ["AuxiliaryNetwork", "build_auxiliary", "known_families", "register"]
