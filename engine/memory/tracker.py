"""Bytes of live tensors, operator by operator, on fake tensors and real ones alike."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUND = 512
"""Bytes a tensor's storage is rounded up to, as CUDA's caching allocator does."""


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operator that makes it to its release.

    A storage counts once however many tensors view it. What exists beforehand is made known with
    ``add``; what operators make counts as ``activations`` until another ``add`` says what it is.

    Known limitation: memory that an operator takes and gives back inside itself is not seen.

    Example:
        >>> import torch
        >>> with MemoryTracker() as tracker:
        ...     x = torch.zeros(1000)
        ...     y = x.view(10, 100) + 1
        ...     del x, y
        >>> tracker.peak_bytes, tracker.live_bytes
        (8192, 0)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, tuple[str, int]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self.live: Counter[str] = Counter()
        self.live_bytes = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far; what is alive now is the new one."""
        self.peak_bytes, self.peak = self.live_bytes, Counter(self.live)

    def add(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of ``tensors`` under ``category``, new or not."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._sizes:
                before, size = self._sizes[key]
                self.live[before] -= size
            else:
                size = -(-storage.nbytes() // ROUND) * ROUND
                self._references[key] = weakref.ref(storage, lambda _, key=key: self._release(key))  # type: ignore[misc]
                self.live_bytes += size
            self._sizes[key] = category, size
            self.live[category] += size
        if self.live_bytes > self.peak_bytes:
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
        self.add((t for t in made if id(t.untyped_storage()) not in self._sizes), "activations")
        return result
