"""BasicSR on today's packages."""

import sys
import types

import pytest

from tasks.super_resolution.repair import TENSOR_FUNCTIONS, repair_basicsr


def test_what_basicsr_imports_is_there() -> None:
    import torchvision.transforms.functional_tensor as functions
    from torchvision.transforms.functional import rgb_to_grayscale

    assert functions.rgb_to_grayscale is rgb_to_grayscale


def test_nothing_is_done_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType(TENSOR_FUNCTIONS)
    monkeypatch.setitem(sys.modules, TENSOR_FUNCTIONS, theirs)
    versions = sys.modules.get("distutils.version")
    repair_basicsr()
    assert sys.modules[TENSOR_FUNCTIONS] is theirs
    assert sys.modules.get("distutils.version") is versions


def test_a_missing_distutils_gets_versions_that_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "distutils"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("tasks.super_resolution.repair._exists", lambda name: name != "distutils.version")
    monkeypatch.setitem(sys.modules, TENSOR_FUNCTIONS, sys.modules[TENSOR_FUNCTIONS])
    repair_basicsr()
    try:
        from distutils.version import LooseVersion

        assert LooseVersion("0.9.1") < LooseVersion("0.13.0")
    finally:
        for name in ("distutils", "distutils.version"):
            sys.modules.pop(name, None)
