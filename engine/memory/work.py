"""Time of a step, predicted from the arithmetic and the memory traffic of its operators."""

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
    """What a device does in a second.

    Floating-point operations of convolutions, bytes read or written, bytes moved to main memory or back.
    """

    flops: float
    bytes: float
    transfer: float

    @classmethod
    def infinite(cls) -> Speed:
        return cls(float("inf"), float("inf"), float("inf"))

    @classmethod
    def measure_apart(cls, device: torch.device, dtype: torch.dtype | None = None) -> Speed:
        """``measure``; on a GPU in a process of its own, whose CUDA context is gone when others are measured."""
        if device.type == "cpu":
            return cls.measure(device, dtype)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(cls.measure, device, dtype).result()

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype | None = None) -> Speed:
        """Time one convolution (forward and backward), one addition and one copy; about a second."""
        batch = 64 if device.type == "cuda" else 4
        x = torch.randn(batch, 64, 56, 56, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype, requires_grad=True)

        def convolve() -> None:
            F.conv2d(x, weight, padding=1).sum().backward()  # type: ignore[no-untyped-call]

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
    return min(seconds[1:])


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums, over all operators, the time that each must take: for its arithmetic or for its traffic.

    A roofline (Williams et al., 2009). Good for comparing steps of one network with each other; in
    absolute terms it may be far off.

    Known limitations: every convolution is taken to be as efficient as the one that was timed; starting an
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
            self.seconds += moved / self.speed.transfer  # read and written: once there, once back
        else:
            self.seconds += max(flops / self.speed.flops, moved / self.speed.bytes)
        return result


_aten = torch.ops.aten
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}
