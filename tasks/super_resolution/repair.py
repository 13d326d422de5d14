"""Make BasicSR 1.4.2 work with current packages, which lack two modules that it imports."""

from __future__ import annotations

import importlib.util
import sys
import types

import torch

TENSOR_FUNCTIONS = "torchvision.transforms.functional_tensor"


def repair_basicsr() -> None:
    """Provide the modules that ``import basicsr`` needs, unless they exist; call this before that import.

    - ``torchvision.transforms.functional_tensor``, from which BasicSR imports ``rgb_to_grayscale``; torchvision 0.17
      renamed it.
    - ``distutils.version.LooseVersion``, which Python 3.12 has removed, unless setuptools provides it.
    """
    if TENSOR_FUNCTIONS not in sys.modules and not _exists(TENSOR_FUNCTIONS):
        from torchvision.transforms.functional import rgb_to_grayscale

        module = types.ModuleType(TENSOR_FUNCTIONS)
        module.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[TENSOR_FUNCTIONS] = module
    if not _exists("distutils.version"):
        version = types.ModuleType("distutils.version")
        version.LooseVersion = torch.torch_version.TorchVersion  # type: ignore[attr-defined]
        package = types.ModuleType("distutils")
        package.version = version  # type: ignore[attr-defined]
        sys.modules.update({"distutils": package, "distutils.version": version})


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
