"""The device that trains, and what the process takes of the machine's memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` names; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device: {name!r} is none of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"train.device: {name!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device: {name} asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device: {name} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    return device


def device_at_hand(name: str) -> torch.device:
    """The device that ``train.device`` names, or the CPU where it names a GPU and there is none.

    Raises:
        ValueError: it names neither.
    """
    return choose_device("auto" if name.startswith("cuda") and not torch.cuda.is_available() else name)


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """On a GPU, algorithms that give the same bits on every run; the CPU's do anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.benchmark = not wanted
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def reset_peak() -> None:
    """Have the peak of the resident set counted from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> tuple[int, int]:
    """Bytes of this process's resident set: now, and at their peak."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would start at what the parent process had
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, peak
    # In bytes on macOS, in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
