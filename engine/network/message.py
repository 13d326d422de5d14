"""The message: everything that crosses a block boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.network.bank import FeatureBank


@dataclass(frozen=True)
class TensorSpec:
    """Everything about a tensor except its values; ``order`` lists its axes from the largest stride to the smallest."""

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
        """The tensor's bytes in the order of its strides. A dense tensor is viewed, not copied."""
        # In this order channels_last tensors are contiguous, so that the layout survives without a copy.
        laid = tensor.detach().permute(self.order).contiguous()
        # torch calls a tensor with one element contiguous whatever its stride, but views bytes only at stride 1.
        return laid.as_strided((laid.numel(),), (1,)).view(torch.uint8)

    def from_bytes(self, raw: Tensor) -> Tensor:
        """The inverse of ``to_bytes``. The result shares memory with ``raw``, which must be aligned for its type."""
        laid = raw.view(self.dtype).view([self.shape[axis] for axis in self.order])
        return laid.permute([self.order.index(axis) for axis in range(len(self.order))])


def flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested lists, tuples and dicts in a fixed order, and the structure that ``unflatten`` needs.

    The structure is the tree with a ``TensorSpec`` in the place of each tensor, so trees with equal structures differ
    only in the values of their tensors.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return tensors, pytree.tree_map_only(Tensor, TensorSpec.of, tree)


def specs(structure: Any) -> list[TensorSpec]:
    """The ``TensorSpec`` of each tensor in ``structure``, in the order of ``flatten``."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, TensorSpec)]


def unflatten(tensors: Sequence[Tensor], structure: Any) -> Any:
    """The inverse of ``flatten``.

    Raises:
        ValueError: the number of tensors, or the shape or type of one, differs from what ``structure`` describes.
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
    """Named activations on their way from one block to the next, with everything that must travel with them.

    Args:
        features: named activations; ``x`` is the main one, and any other name is a skip or a side input. Values are
            tensors, or nested lists, tuples and dicts of tensors.
        targets: what the loss compares the prediction with (labels, boxes, an image), in any nested structure.
        bank: the detached key features of the blocks that the message has passed.
        sequence: the number of the micro-batch. The targets travel with the features, and a block refuses a message
            that is out of turn, so labels are never paired with the outputs of another batch.

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
        """Number of samples: the first dimension of ``x``."""
        return self.x.shape[0]

    def with_x(self, x: Tensor) -> Message:
        """A copy of the message with ``x`` as its main activation."""
        return replace(self, features={**self.features, "x": x})

    def map(self, function: Callable[[Tensor], Tensor]) -> Message:
        """Apply ``function`` to every tensor: features, targets and bank."""
        return Message.of(pytree.tree_map_only(torch.Tensor, function, self.parts()), self.sequence)

    def detach(self) -> Message:
        """Detach every tensor from the graph that made it. Strides (channels_last, for example) stay as they are."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device) -> Message:
        """Move every tensor to ``device``; copies to a GPU do not block the host."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def parts(self) -> tuple[Any, ...]:
        """Features, targets and bank as one tree of plain containers, which pytree can traverse."""
        return dict(self.features), self.targets, dict(self.bank)

    @staticmethod
    def of(parts: tuple[Any, ...], sequence: int) -> Message:
        """The inverse of ``parts``."""
        features, targets, bank = parts
        return Message(features, targets, FeatureBank(bank), sequence)

    def tensors(self) -> list[Tensor]:
        """Every tensor in features, targets and bank, in a fixed order."""
        return flatten(self.parts())[0]


def versions(tree: Any) -> list[int]:
    """How often each tensor of ``tree`` was changed in place; 0 for tensors of inference mode, which keep no count."""
    tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@contextmanager
def unchanged(named: Mapping[str, Any], who: str) -> Iterator[None]:
    """A context in which no tensor may be changed in place, because the next block gets these very tensors.

    Args:
        named: trees of tensors, each under the name that the error uses.
        who: what runs in the context.

    Raises:
        ValueError: a tensor was changed. The message names it.
    """
    before = {name: versions(tree) for name, tree in named.items()}
    yield
    for name, tree in named.items():
        if versions(tree) != before[name]:
            raise ValueError(f"{who} changes {name} in place, and the next block would get the result; clone it first")
