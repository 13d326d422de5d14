"""The device that trains, and the main memory that this process uses."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from engine.utilities.text import none_of

NAMES = ("auto", "cpu", "cuda", "cuda:N")


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` names; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or it names a GPU that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device: {none_of(name, NAMES)}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"train.device: {none_of(name, NAMES)}")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device: {name} asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device: {name} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    return device


def device_at_hand(name: str) -> torch.device:
    """The device that ``train.device`` names, or the CPU if it names a GPU and this machine has none.

    Raises:
        ValueError: the name is unknown.
    """
    return choose_device("auto" if name.startswith("cuda") and not torch.cuda.is_available() else name)


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """A context in which a GPU uses algorithms whose results are bit-identical from run to run, if ``wanted``.

    It changes nothing on a CPU, whose algorithms are deterministic anyway. On leaving, torch's settings are restored.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this when it creates its handle; without a fixed workspace its reductions are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Warn only: some operators (adaptive pooling's backward, for one) have no deterministic form at all.
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # Benchmarking picks the fastest algorithm by the clock, so the choice may differ from run to run.
    torch.backends.cudnn.benchmark = not wanted
    # By default, deterministic mode fills every torch.empty with NaN, which costs a kernel per tensor and changes no
    # result of code that writes before it reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def reset_peak() -> None:
    """Restart the system's count of the peak resident set, where the system supports this (Linux)."""
    with suppress(OSError):  # some containers forbid the write; the peak then covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> tuple[int, int]:
    """Bytes of this process's resident set: (now, at the peak). Outside Linux, the peak stands for both."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss survives fork and exec, so it would start at the parent's peak
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, peak
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
