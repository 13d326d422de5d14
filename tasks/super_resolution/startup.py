"""Make ``model_type: LocalSRModel`` known to BasicSR's own commands: python -m tasks.super_resolution.startup

BasicSR 1.4.2 does not start with current versions of torchvision, and has no option to import a user's module. So this
command writes a file of one line, ``local_learning_basicsr.pth``, to the environment's site-packages. With it, Python
imports this module first whenever it is started as ``-m basicsr.train`` or ``-m basicsr.test``, or with one of these
files as a script, and at no other time. Deleting the file undoes the change.
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from basicsr.utils import options

import tasks.super_resolution  # noqa: F401  repairs BasicSR and registers LocalSRModel
from engine.utilities.command import end_with
from engine.utilities.files import NAMELESS, write_text
from engine.utilities.text import one_line

_parse_options = options.parse_options

FILE = "local_learning_basicsr.pth"
ROOT = Path(__file__).resolve().parents[2]
LINE = (
    "import sys; (lambda word: (word in ('basicsr.train', 'basicsr.test') or ('/' + word).endswith("
    f"('/basicsr/train.py', '/basicsr/test.py'))) and (sys.path.append({str(ROOT)!r}) or "
    "__import__('tasks.super_resolution.startup')).super_resolution.startup.prepare())("
    "next((word for before, word in zip(sys.orig_argv, sys.orig_argv[1:]) "
    "if before == '-m' or not word.startswith('-')), ''))\n"
)
"""The line looks only at the module or script that Python is started with."""


def prepare() -> None:
    """Correct what BasicSR's commands do wrong if BasicSR is installed by pip, or if there is no GPU.

    BasicSR writes experiments/ beside its package, in site-packages, but looks for runs to resume in the current
    folder; with this correction it does both in the current folder. It also loads training states onto the current GPU,
    which fails if there is none, and divides ranks by the number of GPUs. Errors end as ``report`` says.
    """
    sys.excepthook = report
    if Path(options.__file__).is_relative_to(sysconfig.get_path("purelib")):
        options.parse_options = _parse_options_here
    if not torch.cuda.is_available():
        options.init_dist = _refuse_ranks
        torch.cuda.current_device = lambda: 0
        torch.UntypedStorage.cuda = _stay  # type: ignore[assignment,method-assign]


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take the place of ``sys.excepthook``: print an error that ends the process.

    Raises:
        SystemExit: the error is a ValueError that this project's code raised, as it does for a user's mistakes, or a
            full disk. It was printed in one line.
    """
    raised_in = Path(traceback.extract_tb(trace)[-1].filename) if trace else Path()
    ours = any(raised_in.is_relative_to(ROOT / name) for name in ("engine", "tasks"))
    if not (isinstance(error, ValueError) and ours) and not (isinstance(error, OSError) and error.errno in NAMELESS):
        sys.__excepthook__(kind, error, trace)
        return
    end_with(f"error: {one_line(error)}")


class _OptionsHere(OrderedDict[str, Any]):
    """Options whose root is the current folder, whatever BasicSR sets."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, str(Path.cwd()) if key == "root_path" else value)


def _parse_options_here(root: str, is_train: bool = True) -> tuple[Any, Any]:
    parsed, arguments = _parse_options(str(Path.cwd()), is_train)
    return _OptionsHere(parsed), arguments


def _refuse_ranks(launcher: str, **kwargs: Any) -> None:
    """Raises ValueError: BasicSR itself would divide by the number of GPUs, which is 0."""
    raise ValueError(
        f"--launcher {launcher}: BasicSR puts each rank on a GPU, and there is none here; leave --launcher out and "
        "start one process, or use this project's tools/train.py, whose ranks may be on a CPU"
    )


def _stay(storage: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
    return storage


def install(folder: Path) -> Path:
    """Write the file into ``folder``."""
    target = folder / FILE
    write_text(target, LINE)
    return target


if __name__ == "__main__":
    print(f"wrote {install(Path(sysconfig.get_path('purelib')))}")
