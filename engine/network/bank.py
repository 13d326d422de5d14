"""The feature bank: detached key features of the blocks before this one, this iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class FeatureBank(Mapping[int, Any]):
    """Key features by index of the block that made them; adding returns a new bank.

    GLCAN's global part reads it "just as the features are used in the backbone" (arXiv 2406.00446).
    That it holds *this iteration's* features of *earlier* blocks is our choice: they cost no second
    forward, carry no gradient, and keep every message going one way.

    Example:
        >>> bank = FeatureBank().add(0, "stem features")
        >>> dict(bank), 1 in bank
        ({0: 'stem features'}, False)
    """

    def __init__(self, features: Mapping[int, Any] | None = None) -> None:
        self._features = dict(features or {})

    def add(self, block: int, features: Any) -> FeatureBank:
        """The bank with the (already detached) key features of ``block`` added."""
        assert block not in self._features, f"block {block} is in the bank already"
        return FeatureBank({**self._features, block: features})

    def __getitem__(self, block: int) -> Any:
        return self._features[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)
