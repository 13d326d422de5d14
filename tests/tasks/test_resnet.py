"""CIFAR ResNets: names and sizes of He et al., and given weights that classify real images."""

from pathlib import Path

import pytest
import torch

from engine.network.message import Message
from tasks.classification.resnet import ResNet, resnet_chain
from tasks.weights import load_weights
from tests.shared import CIFAR10, SHARED, needs_shared


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_sizes_of_the_paper(depth: int, millions: float) -> None:
    """He et al. 2016, table 6."""
    count = sum(parameter.numel() for parameter in ResNet(depth, 10).parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.04)


@pytest.mark.parametrize("depth", [20, 32])
def test_the_chain_is_the_network(depth: int) -> None:
    chain = resnet_chain(depth, 10, 32)
    assert len(chain) == (depth - 2) // 2 + 1
    assert [unit.name for unit in chain.units[:3]] == ["stem", "layer1.0", "layer1.1"]
    x = torch.randn(2, 3, 32, 32)
    chain.model.eval()
    assert torch.equal(chain(Message({"x": x})), chain.model(x))
    assert next(iter(chain.model.state_dict())) == "conv1.weight"
    assert {"layer1.0.conv1.weight", "linear.bias"} <= set(chain.model.state_dict())


def test_depths_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="resnet21 does not exist; CIFAR-style depths are 6n"):
        ResNet(21, 10)


@pytest.mark.slow
@needs_shared("weights/resnet20-12fca82f.th")
def test_given_weights_load_and_classify_real_images() -> None:
    """About 81 % on these JPEG files, says the data's README."""
    from engine.task import evaluate
    from tasks.classification.config import ClassificationConfig
    from tasks.classification.task import Classification

    config = ClassificationConfig(task="classification")
    config.data.name, config.data.root = "folder", str(CIFAR10())
    task = Classification(config)
    chain = resnet_chain(20, 10, 32)
    load_weights(chain.model, SHARED / "weights/resnet20-12fca82f.th")
    chain.model.eval()
    with torch.no_grad():
        assert evaluate(task, chain)["accuracy"] == pytest.approx(0.81, abs=0.03)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    chain = resnet_chain(8, 10, 32)
    before = {name: tensor.clone() for name, tensor in chain.model.state_dict().items()}
    torch.save(ResNet(14, 10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit: 'layer1.1.conv1.weight' is torch.Size.*nothing"):
        load_weights(chain.model, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"torn.pth cannot be read"):
        load_weights(chain.model, tmp_path / "torn.pth")
    with pytest.raises(ValueError, match="no such file"):
        load_weights(chain.model, tmp_path / "none.pth")
    torch.save(torch.zeros(3), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare.pth holds Tensor, not tensors by name"):
        load_weights(chain.model, tmp_path / "bare.pth")
    torch.save({"weights": print}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match=r"pickle.pth cannot be read"):
        load_weights(chain.model, tmp_path / "pickle.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.model.state_dict().items())
