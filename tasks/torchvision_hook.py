"""Define missing torchvision operators whenever torchvision is first imported, whoever imports it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


class TorchvisionHook(importlib.abc.MetaPathFinder):
    """Finds torchvision as ever, with a loader that lets it be imported (see ``tasks.torchvision_operators``).

    A hook, since frameworks import torchvision too (timm, mmcv, torchmetrics), and importing it ahead of them would
    cost everybody who only asks for ``--help`` several seconds. It stays: whoever asks whether there is a torchvision
    (``importlib.util.find_spec``) calls it without importing anything.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from tasks.torchvision_operators import define_operators  # imports torch

        # From here on the module is its own loader's, which gives out torchvision's resources too.
        module.__loader__ = self._own
        assert module.__spec__ is not None
        module.__spec__.loader = self._own
        ours = define_operators()
        self._own.exec_module(module)
        if ours:
            from torchvision.ops import boxes

            # torchvision.ops.nms asks whether its own library is there; the operator it then calls is ours.
            boxes._assert_has_ops = lambda: None


def install() -> None:
    """Have the hook wait for torchvision, unless that is imported already or the hook is waiting."""
    if "torchvision" not in sys.modules and not any(isinstance(each, TorchvisionHook) for each in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionHook())
