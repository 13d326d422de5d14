"""Have BasicSR's own commands know ``model_type: LocalSRModel``: python -m tasks.super_resolution.startup

BasicSR 1.4.2 neither starts on today's torchvision nor has a way to name a module of one's own. So this writes one line
into the environment's site-packages, ``local_learning_basicsr.pth``, by which Python imports this module first whenever
it is started as ``-m basicsr.train`` or ``-m basicsr.test``, or with one of these files as a script, and never else.
Deleting the file undoes it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch

import tasks.super_resolution  # noqa: F401  BasicSR repaired, LocalSRModel registered

FILE = "local_learning_basicsr.pth"
LINE = (
    "import sys; (lambda word: (word in ('basicsr.train', 'basicsr.test') or ('/' + word).endswith("
    "('/basicsr/train.py', '/basicsr/test.py'))) and __import__('tasks.super_resolution.startup')"
    ".super_resolution.startup.prepare())(next((word for before, word in zip(sys.orig_argv, sys.orig_argv[1:]) "
    "if before == '-m' or not word.startswith('-')), ''))\n"
)
"""Looks at the module or script that Python is started with, and at nothing else."""


def prepare() -> None:
    """Without a GPU, let BasicSR resume: it loads training states onto the current GPU, and fails for want of one."""
    if torch.cuda.is_available():
        return

    def stay(storage: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        return storage

    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.UntypedStorage.cuda = stay  # type: ignore[assignment,method-assign]


def install(folder: Path) -> Path:
    """Write the file into ``folder``."""
    target = folder / FILE
    target.write_text(LINE)
    return target


if __name__ == "__main__":
    print(f"wrote {install(Path(sysconfig.get_path('purelib')))}")
