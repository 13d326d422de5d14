"""The feature bank: detached key features that the blocks before this one computed in this iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class FeatureBank(Mapping[int, Any]):
    """Key features by the index of the block that made them; adding features returns a new bank.

    The global part of GLCAN (arXiv 2406.00446) reads the bank. That it holds detached features of *this iteration* and
    of *earlier* blocks is our own choice, since nothing public decides it: these features cost no second forward pass,
    carry no gradient, and let every message travel in one direction.

    Example:
        >>> bank = FeatureBank().add(0, "stem features")
        >>> dict(bank), 1 in bank
        ({0: 'stem features'}, False)
    """

    def __init__(self, features: Mapping[int, Any] | None = None) -> None:
        self._features = dict(features or {})

    def add(self, block: int, features: Any) -> FeatureBank:
        """A new bank that also holds the key features of ``block``, which must already be detached."""
        assert block not in self._features, f"block {block} is in the bank already"
        return FeatureBank({**self._features, block: features})

    def __getitem__(self, block: int) -> Any:
        return self._features[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)
