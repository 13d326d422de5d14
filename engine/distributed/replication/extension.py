"""DeepSpeed's extension for ranks on a CPU, which torch compiles at its first use and keeps in a cache.

While torch compiles, a file called ``lock`` lies in the cache, and other processes wait for it to vanish. A build that
was killed leaves the file, and every later process would wait forever.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from engine.utilities.console import console, first_of_host

PATIENCE = 600.0
"""Seconds after which no build can still be running, on however slow a host."""


def prepare_extension() -> None:
    """Remove the lock of a build that was killed, and say so if the extension has yet to be built.

    Only the first rank of a host does so; if others wait for the lock already, they go on when it vanishes.
    """
    if not first_of_host():
        return
    root = cache()
    for lock in sorted(root.glob("**/deepspeed*/lock")):
        if in_use(lock):
            console.print(f"waiting for another process that is building DeepSpeed's extension; it holds {lock}")
        else:
            lock.unlink(missing_ok=True)
            console.print(f"removed {lock}, left by a killed build of DeepSpeed's extension")
    if not any(root.glob("**/deepspeed*/*.so")):
        console.print(f"building DeepSpeed's extension in {root}, once, about two minutes")


def cache() -> Path:
    """The folder in which torch keeps compiled extensions."""
    from torch.utils.cpp_extension import get_default_build_root  # here, because it imports setuptools

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def in_use(lock: Path) -> bool:
    """Whether the process that made a lock may still be running: it keeps the file open until it removes it."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    # Which files other hosts have open cannot be seen; without /proc, not even those of this host.
    several = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")  # torchrun sets both
    if not Path("/proc/self/fd").is_dir() or several:
        return age < PATIENCE
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == lock.resolve():
                return True
        except OSError:  # the process has ended, or is another user's
            continue
    return False


def build() -> None:
    """Compile the extension now, so that no training waits for it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    prepare_extension()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    build()
