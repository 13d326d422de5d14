"""VGG's features: torchvision's own, frozen, named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tasks  # noqa: F401  torchvision's operators first
from tasks.style_transfer.vgg import VGG, VGGConfig
from tests.shared import needs_shared
from tests.tasks.style_transfer.scin.networks import REAL_VGG16

# Where torchvision's networks have them, after the ReLU.
PLACES = {
    "vgg16": {"relu1_1": 1, "relu2_2": 8, "relu3_1": 11, "relu4_3": 22, "relu5_1": 25},
    "vgg19": {"relu1_1": 1, "relu2_2": 8, "relu3_4": 17, "relu4_1": 20, "relu5_1": 29},
}


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_features_are_torchvisions(tmp_path: Path, name: str) -> None:
    from torchvision import models

    network = getattr(models, name)().eval()
    torch.save({key: value for key, value in network.state_dict().items() if "features" in key}, tmp_path / "vgg.pth")
    found = VGG(VGGConfig(name, str(tmp_path / "vgg.pth")), list(PLACES[name]), saved=False)(
        image := torch.rand(1, 3, 48, 48)
    )
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    for layer, place in PLACES[name].items():
        torch.testing.assert_close(found[layer], network.features[: place + 1](x), rtol=1e-4, atol=1e-4)


def test_bytes_are_what_other_weights_see() -> None:
    """The same picture, if the first convolution is scaled: 255 (rgb - mean) is 255 deviation times the normalised."""
    torch.manual_seed(0)
    unit = VGG(VGGConfig("vgg16", "random"), ["relu1_1"], saved=False)
    torch.manual_seed(0)
    in_bytes = VGG(VGGConfig("vgg16", "random", "bytes"), ["relu1_1"], saved=False)
    in_bytes.relu1_1.weight.div_(255 * in_bytes.deviation)
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(in_bytes(image)["relu1_1"], unit(image)["relu1_1"], rtol=1e-4, atol=1e-5)


def test_frozen_and_saved_only_if_asked() -> None:
    for saved in (True, False):
        vgg = VGG(VGGConfig("vgg16", "random"), ["relu2_1"], saved=saved)
        assert not list(vgg.parameters())
        assert bool(vgg.state_dict()) == saved
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    vgg(image)["relu2_1"].sum().backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [1, 2, 3, 9])
def test_the_smallest_images_have_features(side: int) -> None:
    found = VGG(VGGConfig("vgg16", "random"), ["relu5_1"], saved=False)(torch.rand(1, 3, side, side))
    assert min(found["relu5_1"].shape) >= 1


@needs_shared("weights")
def test_real_weights_as_far_as_they_go() -> None:
    vgg = VGG(REAL_VGG16, ["relu4_1"], saved=False)
    assert vgg(torch.rand(1, 3, 32, 32))["relu4_1"].std() > 0
    with pytest.raises(ValueError, match=r"as far as relu4_1 and has no features.19.weight; relu5_1 of vgg16 is"):
        VGG(REAL_VGG16, ["relu5_1"], saved=False)


def test_bad_names_and_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'relu4_4' is not a layer of vgg16; its layers are relu1_1, .*relu5_3$"):
        VGG(VGGConfig("vgg16", "random"), ["relu4_4"], saved=False)
    with pytest.raises(ValueError, match=r"^model.vgg.weights: no such file"):
        VGG(VGGConfig("vgg16", str(tmp_path / "no.pth")), ["relu1_1"], saved=False)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^model.vgg.weights: .*bad.safetensors cannot be read") as error:
        VGG(VGGConfig("vgg16", str(tmp_path / "bad.safetensors")), ["relu1_1"], saved=False)
    assert "\n" not in str(error.value)
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3), "features.0.bias": torch.zeros(8)}, tmp_path / "thin.pth")
    with pytest.raises(ValueError, match=r"relu1_1 of .*thin.pth is \(8, 3, 3, 3\), not \(64, 3, 3, 3\)"):
        VGG(VGGConfig("vgg16", str(tmp_path / "thin.pth")), ["relu1_1"], saved=False)


def test_weights_that_cannot_be_downloaded_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", _no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_network)
    with pytest.raises(
        ValueError, match=r"^model.vgg.weights: torchvision's vgg19 cannot be downloaded; give a file"
    ) as error:
        VGG(VGGConfig(), ["relu1_1"], saved=False)
    assert "\n" not in str(error.value)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")
