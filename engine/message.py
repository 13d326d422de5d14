"""The message: everything that crosses a block boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.bank import FeatureBank


@dataclass(frozen=True)
class Structure:
    """What a message looks like without its numbers: equal structures need no new header on a link.

    ``spec`` is the nesting, ``leaves`` one entry a leaf: (shape, dtype) of a tensor, or the value itself.
    """

    spec: Any
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Message:
    """Named activations on their way from one block to the next, with all that must travel along.

    Args:
        features: named activations; ``x`` is the main one, any other name is a skip or side input.
            Values are tensors or nested lists, tuples and dicts of tensors.
        targets: what the loss compares with (labels, boxes, an image): any nested structure.
        bank: detached key features of the blocks passed so far.
        sequence: number of the micro-batch this message belongs to. The targets travel with the
            features, and a block refuses a message out of turn, so labels are never paired with the
            outputs of another batch.

    Example:
        >>> message = Message({"x": torch.ones(2, 3)}, targets=torch.tensor([0, 1]))
        >>> message.with_x(message.x * 2).x.sum().item()
        12.0
    """

    features: Mapping[str, Any]
    targets: Any = None
    bank: FeatureBank = field(default_factory=FeatureBank)
    sequence: int = 0

    @property
    def x(self) -> Tensor:
        """The main activation."""
        main: Tensor = self.features["x"]
        return main

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.x.shape[0]

    def with_x(self, x: Tensor) -> Message:
        """The same message with another main activation."""
        return replace(self, features={**self.features, "x": x})

    def map(self, function: Callable[[Tensor], Tensor]) -> Message:
        """Apply ``function`` to every tensor: features, targets and bank."""
        features, targets, bank = pytree.tree_map_only(
            torch.Tensor, function, (dict(self.features), self.targets, dict(self.bank))
        )
        return Message(features, targets, FeatureBank(bank), self.sequence)

    def detach(self) -> Message:
        """Cut the message off the graph that made it. Strides (channels_last, say) are kept."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device) -> Message:
        """Move every tensor to ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def flatten(self) -> tuple[list[Tensor], Structure]:
        """Tensors in a fixed order, and the structure that ``unflatten`` needs to put them back."""
        tree = (dict(self.features), self.targets, dict(self.bank))
        leaves, spec = pytree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        described = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tensors, Structure((spec, tuple(isinstance(leaf, Tensor) for leaf in leaves)), described)

    @staticmethod
    def unflatten(tensors: list[Tensor], structure: Structure, sequence: int) -> Message:
        """Inverse of ``flatten``.

        Raises:
            ValueError: the tensors are not those that ``structure`` describes.
        """
        spec, is_tensor = structure.spec
        if len(tensors) != sum(is_tensor):
            raise ValueError(f"message {sequence}: {len(tensors)} tensors arrived, {sum(is_tensor)} expected")
        arrived = iter(tensors)
        leaves = []
        for number, (expected, tensor) in enumerate(zip(structure.leaves, is_tensor, strict=True)):
            if not tensor:
                leaves.append(expected)
                continue
            leaf = next(arrived)
            if (tuple(leaf.shape), leaf.dtype) != expected:
                raise ValueError(
                    f"message {sequence}: tensor {number} is {tuple(leaf.shape)} {leaf.dtype}, "
                    f"expected {expected[0]} {expected[1]}"
                )
            leaves.append(leaf)
        features, targets, bank = pytree.tree_unflatten(leaves, spec)
        return Message(features, targets, FeatureBank(bank), sequence)
