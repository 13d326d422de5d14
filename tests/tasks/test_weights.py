"""Files of weights as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks.classification.chain import build_model_chain
from tasks.classification.config import ModelConfig
from tasks.classification.resnet import ResNet
from tasks.weights import load_weights


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    torch.manual_seed(1)
    return ResNet(8, classes=10).state_dict()


def chain_of(path: Path, classes: int = 10) -> Any:
    return build_model_chain(ModelConfig(name="resnet8", weights=str(path)), classes, 16)


WRAPPED = {
    "plain": lambda state: state,
    "an accuracy of numpy's": lambda state: {"state_dict": state, "best": np.float64(91.2), "curve": np.ones(3)},
    "a tutorial's key": lambda state: {"model_state_dict": state, "epoch": 3},
    "one key within another": lambda state: {"state_dict": {"model": state}},
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found(how: str, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(WRAPPED[how](state), tmp_path / "file.pth")
    for name, tensor in chain_of(tmp_path / "file.pth").model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("classes", [100, 0])
def test_a_head_for_other_classes_starts_fresh_and_the_log_says_so(
    classes: int, state: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ResNet(8, classes=classes or 10).state_dict()
    if not classes:
        given = {name: tensor for name, tensor in given.items() if not name.startswith("linear.")}
    torch.save(given, tmp_path / "file.pth")
    chain = chain_of(tmp_path / "file.pth")
    said = " ".join(capsys.readouterr().out.split())
    assert f"has {f'{classes} classes' if classes else 'no head'}; linear.weight, linear.bias start fresh" in said
    head = set(chain.names(chain.head.module))
    for name, tensor in chain.model.state_dict().items():
        assert name in head or torch.equal(tensor, given[name]), name


def test_anything_else_that_differs_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(ResNet(14, classes=10).state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"^model.weights: \S+deeper.pth does not fit: 'layer1.1.\S+' is "):
        chain_of(tmp_path / "deeper.pth")
    torch.save({**state, "linear.weight": torch.zeros(10, 7)}, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"^model.weights: \S+wide.pth does not fit: 'linear.weight' is "):
        chain_of(tmp_path / "wide.pth")


class Mine:
    """No tensor."""


def test_values_that_are_not_finite_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    """The run ended in its first step, with the advice to lower the learning rate."""
    torch.save({**state, "linear.bias": torch.full((10,), float("nan"))}, tmp_path / "file.pth")
    with pytest.raises(
        ValueError, match=r"^model.weights: .*file.pth holds values of 'linear.bias' that are not finite"
    ):
        chain_of(tmp_path / "file.pth")


def test_what_could_run_code_is_refused_without_bad_advice(tmp_path: Path) -> None:
    """torch's own message advises weights_only=False."""
    torch.save({"state_dict": {}, "mine": Mine()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"^model.weights: \S+ cannot be read: it holds \S+Mine, which is no") as error:
        load_weights(nn.Linear(1, 1), tmp_path / "file.pth")
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
