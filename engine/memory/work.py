"""The time of a step, predicted from the arithmetic and the memory traffic of its operators."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.learning import offload


@dataclass(frozen=True)
class Speed:
    """What a device does per second.

    ``flops`` counts floating-point operations of convolutions, ``bytes`` those read or written in the device's memory,
    and ``transfer`` bytes moved to main memory or back.
    """

    flops: float
    bytes: float
    transfer: float

    @classmethod
    def infinite(cls) -> Speed:
        return cls(float("inf"), float("inf"), float("inf"))

    @classmethod
    def measure_apart(cls, device: torch.device, dtype: torch.dtype | None = None) -> Speed:
        """As ``measure``, but on a GPU in a process of its own, so that no CUDA context remains in this process."""
        if device.type == "cpu":
            return cls.measure(device, dtype)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(cls.measure, device, dtype).result()

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype | None = None) -> Speed:
        """Time one convolution (forward and backward), one addition and one copy. This takes about a second."""
        batch = 64 if device.type == "cuda" else 4
        x = torch.randn(batch, 64, 56, 56, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype, requires_grad=True)

        def convolve() -> None:
            F.conv2d(x, weight, padding=1).sum().backward()  # type: ignore[no-untyped-call]

        # Forward and the gradients of input and weight are three convolutions; a multiplication and an addition each.
        flops = 3 * 2 * x.shape[0] * 56 * 56 * 64 * 64 * 9
        large = torch.randn(2**24, device=device)
        target = torch.empty_like(large)
        host = torch.empty_like(large, device="cpu", pin_memory=device.type == "cuda")
        adding = _best(lambda: torch.add(large, large, out=target), device)
        copying = _best(lambda: host.copy_(large, non_blocking=True), device)
        return cls(flops / _best(convolve, device), 2 * large.nbytes / adding, large.nbytes / copying)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first run includes allocation; the shortest one is the least disturbed


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums, over all operators, the time that each needs for its arithmetic or for its memory traffic, if that is more.

    This is a roofline model (Williams et al., 2009). It serves to compare steps of one network with each other; the
    absolute time may be far off.

    Known limitations: every convolution is assumed to be as efficient as the one that was timed, and to start an
    operator costs nothing.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.speed, self.seconds = speed, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim" or func._overloadpacket in _FREE:
            return result
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        leaves = tree_leaves((args, kwargs, result))
        moved = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        if offload.standing_in():
            # The clone reads and writes every byte once, so ``moved`` counts a tensor twice: once for the way to main
            # memory, and once for the way back, whose clone is not marked as a transfer.
            self.seconds += moved / self.speed.transfer
        else:
            self.seconds += max(flops / self.speed.flops, moved / self.speed.bytes)
        return result


_aten = torch.ops.aten
# Operators that only allocate: they neither compute nor move bytes.
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}
