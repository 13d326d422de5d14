"""The message: everything that crosses a block boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.network.bank import FeatureBank


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its numbers; ``order`` has its axes from the largest stride to the smallest."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
        return cls(tuple(tensor.shape), tensor.dtype, tuple(order))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_bytes(self, tensor: Tensor) -> Tensor:
        """The tensor's bytes in order of its strides; of a dense tensor nothing is copied."""
        laid = tensor.detach().permute(self.order).contiguous()
        # A single element is contiguous whatever its stride, but only one of stride 1 can be viewed as bytes.
        return laid.as_strided((laid.numel(),), (1,)).view(torch.uint8)

    def from_bytes(self, raw: Tensor) -> Tensor:
        """Inverse of ``to_bytes``; shares memory with ``raw``, whose start must be aligned."""
        laid = raw.view(self.dtype).view([self.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(len(self.order))])


def flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """Tensors of nested lists, tuples and dicts in a fixed order, and the structure that ``unflatten`` needs.

    The structure is the tree with a ``TensorSpec`` in each tensor's place: two trees of equal structure differ in
    nothing but their tensors' numbers.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return tensors, pytree.tree_map_only(Tensor, TensorSpec.of, tree)


def specs(structure: Any) -> list[TensorSpec]:
    """Of the tensors, in the order of ``flatten``."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, TensorSpec)]


def unflatten(tensors: Sequence[Tensor], structure: Any) -> Any:
    """Inverse of ``flatten``.

    Raises:
        ValueError: the tensors are not those that ``structure`` describes.
    """
    expected = specs(structure)
    if len(tensors) != len(expected):
        raise ValueError(f"{len(tensors)} tensors arrived, {len(expected)} expected")
    for number, (tensor, spec) in enumerate(zip(tensors, expected, strict=True)):
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"tensor {number} is {tuple(tensor.shape)} {tensor.dtype}, expected {spec.shape} {spec.dtype}"
            )
    arrived = iter(tensors)
    return pytree.tree_map_only(TensorSpec, lambda _: next(arrived), structure)


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
        return Message.of(pytree.tree_map_only(torch.Tensor, function, self.parts()), self.sequence)

    def detach(self) -> Message:
        """Cut the message off the graph that made it. Strides (channels_last, say) are kept."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device) -> Message:
        """Move every tensor to ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def parts(self) -> tuple[Any, ...]:
        """Features, targets and bank as one tree of plain containers."""
        return dict(self.features), self.targets, dict(self.bank)

    @staticmethod
    def of(parts: tuple[Any, ...], sequence: int) -> Message:
        """Inverse of ``parts``."""
        features, targets, bank = parts
        return Message(features, targets, FeatureBank(bank), sequence)

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, in a fixed order."""
        return flatten(self.parts())[0]
