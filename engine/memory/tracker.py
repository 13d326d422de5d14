"""The bytes of live tensors, operator by operator, for fake and real tensors alike."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.learning import offload

ROUND = 512
"""The size of a storage is rounded up to a multiple of this many bytes, as CUDA's caching allocator does."""

MOMENTS = 200
"""A timeline has fewer than twice this many moments."""


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a stretch of operators: bytes by category, and the block that ran."""

    block: int
    live: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.live.values())


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage on one kind of device, from the operator that makes it until its release.

    A storage counts once, however many tensors view it. ``add`` makes tensors known that exist beforehand. The category
    of a tensor that an operator makes follows from when it is made, until ``add`` gives it another:

    =============== ============================================================================
    ``activations`` while gradients are enabled: by the forward pass or its recomputation
    ``temporary``   while gradients are disabled: by the backward pass or the update
    ``auxiliary``   while ``made_in_forward`` says so: by the forward pass of an auxiliary network
    ``loss``        while ``made_in_forward`` says so: by a loss that has networks of its own
    =============== ============================================================================

    Args:
        device: ``cpu`` or ``cuda``. Tensors on other devices do not count, nor do copies that stand for a tensor in
            main memory (see ``engine.learning.offload``).

    Known limitations: the tracker does not see memory that an operator takes and returns while it runs, nor the growth
    of a storage that is resized.

    Example:
        >>> import torch
        >>> with MemoryTracker() as tracker:
        ...     x = torch.zeros(1000)
        ...     y = x.view(10, 100) + 1
        ...     del x, y
        >>> tracker.peak.bytes, tracker.live_bytes
        (8192, 0)
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.made_in_forward, self.block = device, "activations", 0
        self._sizes: dict[int, tuple[str, int]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self.live: Counter[str] = Counter()
        self.live_bytes = 0
        self.timeline: list[Moment] | None = None
        self._stretch, self._left = 1, 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far, and start again from what is alive now."""
        self._peak_bytes, self.peak = self.live_bytes, Moment(self.block, Counter(self.live))

    def record(self) -> None:
        """Start a timeline: the fullest moment of each stretch of operators, fewer than twice ``MOMENTS`` in all."""
        self.timeline, self._stretch, self._left = [], 1, 0

    def add(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of ``tensors`` under ``category``, whether they are known already or not."""
        self._add(tensors, lambda before: category)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Count those of ``tensors`` that are new or temporary as activations, because they outlive their step."""
        self._add(tensors, lambda before: "activations" if before in (None, "temporary") else before)

    def _add(self, tensors: Iterable[Tensor], choose: Callable[[str | None], str]) -> None:
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key = id(storage)
            before, size = self._sizes.get(key, (None, 0))
            if before is None:
                size = 0 if offload.standing_in() else -(-storage.nbytes() // ROUND) * ROUND
                # The id of a storage is unique while it lives, and this reference tells when it dies, so that no tensor
                # stays alive because it is counted.
                self._references[key] = weakref.ref(storage, lambda _, key=key: self._release(key))  # type: ignore[misc]
                self.live_bytes += size
            else:
                self.live[before] -= size
            category = choose(before)
            self._sizes[key] = category, size
            self.live[category] += size
        if self.live_bytes > self._peak_bytes:
            self.reset_peak()

    def _release(self, key: int) -> None:
        category, size = self._sizes.pop(key)
        del self._references[key]
        self.live[category] -= size
        self.live_bytes -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if id(tensor.untyped_storage()) not in self._sizes]
        if new:
            # Backward and updates run with gradients disabled, except where backward recomputes a forward pass.
            self.add(new, self.made_in_forward if torch.is_grad_enabled() else "temporary")
        if self.timeline is not None:
            self._note()
        return result

    def _note(self) -> None:
        """Extend the timeline. When it is full, halve it by merging pairs of stretches, and double their length."""
        assert self.timeline is not None
        if self._left == 0:
            if len(self.timeline) == 2 * MOMENTS - 1:
                pairs = zip(self.timeline[::2], self.timeline[1::2], strict=False)
                self.timeline = [max(pair, key=lambda moment: moment.bytes) for pair in pairs]
                self._stretch *= 2
            self.timeline.append(Moment(self.block, Counter(self.live)))
            self._left = self._stretch
        elif self.live_bytes > self.timeline[-1].bytes:
            self.timeline[-1] = Moment(self.block, Counter(self.live))
        self._left -= 1
