from pathlib import Path

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR

from tasks.super_resolution.config import ModelConfig
from tasks.super_resolution.network import build_network, side_multiple
from tests.tasks.super_resolution.networks import SMALL, image, small_network

HAS = {"EDSR": (2, 3, 4, 8), "MSRResNet": (2, 3, 4), "RCAN": (2, 3, 4, 8), "RRDBNet": (2, 4), "SwinIR": (2, 3, 4, 8)}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8])
def test_a_scale_is_the_networks_or_refused(kind: str, scale: int) -> None:
    """MSRResNet of scale 8 fails in its constructor, RRDBNet of scale 3 enlarges by 4 without a word."""
    if scale in HAS[kind]:
        assert small_network(kind, scale)(image(1, 3, 16, 16)).shape[-1] == 16 * scale
    else:
        with pytest.raises(ValueError, match=f"{kind}.* has no scale {scale}; it has"):
            small_network(kind, scale)


def test_what_the_network_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="EDSR has no argument 'num_features'; known: num_in_ch"):
        build_network(ModelConfig("EDSR", 2, {"num_features": 8}))
    with pytest.raises(ValueError, match=r"upscale is model\.scale"):
        build_network(ModelConfig("EDSR", 2, {"upscale": 4}))
    with pytest.raises(ValueError, match="SwinIR with upsampler nearest.conv has no scale 2; it has 4 alone"):
        build_network(ModelConfig("SwinIR", 2, {"upsampler": "nearest+conv"}))


def test_weights_as_basicsr_writes_them(tmp_path: Path) -> None:
    options = SMALL["EDSR"]
    plain, averaged = EDSR(3, 3, upscale=2, **options), EDSR(3, 3, upscale=2, **options)
    both, one = tmp_path / "both.pth", tmp_path / "one.pth"
    torch.save({"params": plain.state_dict(), "params_ema": averaged.state_dict()}, both)
    torch.save({"params": plain.state_dict()}, one)
    for path, wanted in ((both, averaged), (one, plain)):
        loaded = build_network(ModelConfig("EDSR", 2, options, str(path))).state_dict()
        assert all(loaded[name].equal(tensor) for name, tensor in wanted.state_dict().items())
    with pytest.raises(ValueError, match="does not fit"):
        build_network(ModelConfig("EDSR", 4, options, str(one)))


def test_sides_must_be_multiples_of_windows() -> None:
    assert [side_multiple(small_network(kind)) for kind in ("EDSR", "RRDBNet", "SwinIR")] == [1, 2, 8]
    assert side_multiple(small_network("RRDBNet", 4)) == 1
