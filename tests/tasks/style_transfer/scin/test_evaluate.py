"""What the figures of repainted photographs are, however they come, and the contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from tasks.style_transfer import measures
from tasks.style_transfer.images import as_pixels
from tasks.style_transfer.measures import FrechetInceptionDistance, load_fid
from tasks.style_transfer.scin import data
from tasks.style_transfer.scin.config import DataConfig
from tasks.style_transfer.scin.evaluate import StyleMetrics
from tasks.style_transfer.sheet import GAP

CONTENTS, STYLES, SIDE = 2, 3, 64


def measure(pictures: Tensor, contents: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of mean values from the painting's, of pixels from the content's."""
    assert not torch.is_grad_enabled()
    assert pictures.shape == contents.shape == styles.shape == (len(pictures), 3, SIDE, SIDE)
    return (pictures - styles).mean((1, 2, 3)).abs(), (pictures - contents).abs().mean((1, 2, 3))


def config(root: Path, **changes: Any) -> DataConfig:
    """Smooth noise, of different brightness."""
    random = np.random.default_rng(0)
    for folder, count in (("contents", CONTENTS), ("styles", STYLES)):
        (root / folder).mkdir(exist_ok=True)
        for number in range(count):
            coarse = random.integers(0, 100 + 50 * number, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(root / folder / f"{number}.png")
    folders = {"test_contents": [str(root / "contents")], "test_styles": [str(root / "styles")]}
    return DataConfig(name="folders", crop=SIDE, **{**folders, **changes})


def open_tests(settings: DataConfig) -> data.TestPairs:
    contents, styles = (
        sorted(Path(folders[0]).iterdir()) for folders in (settings.test_contents, settings.test_styles)
    )
    return data.TestPairs(data.Split([], [], contents, styles), settings)


def pictures(test: data.TestPairs) -> Tensor:
    """Every content with some of the painting."""
    return torch.stack([content * 0.7 + style * 0.3 for content, style, _ in (test[0, n] for n in range(len(test)))])


def give(metrics: StyleMetrics, results: Tensor, *batches: list[int]) -> StyleMetrics:
    """``results`` of all test pairs, in batches of these pairs."""
    for pairs in batches or [list(range(len(results)))]:
        contents, styles, numbers = zip(*(metrics.test[0, number] for number in pairs), strict=True)
        targets = {"content": torch.stack(contents), "style": torch.stack(styles), "pair": torch.tensor(numbers)}
        metrics.update(results[pairs], targets)
    return metrics


class ToyInception(nn.Module):
    """Mean and deviation of red and green: 4 features."""

    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return torch.cat([images[:, :2].double().mean((2, 3)), images[:, :2].double().std((2, 3))], 1) / 50


@pytest.fixture
def toy_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights for LPIPS, toy features for FID; a file to name."""
    from torchmetrics.functional.image import lpips  # above it would come before torchvision's operators

    real = lpips._get_tv_model_features
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: real(net, False))
    torch.manual_seed(0)
    file = tmp_path / "inception.pth"
    torch.save({}, file)

    def toy(feature_extractor_weights_path: str, **options: Any) -> FrechetInceptionDistance:
        assert feature_extractor_weights_path == str(file)
        return FrechetInceptionDistance(ToyInception(), **options)

    monkeypatch.setattr(measures, "FrechetInceptionDistance", toy)
    return file


def test_figures_of_flat_pictures_are_known(tmp_path: Path) -> None:
    settings = config(tmp_path)
    for folder in ("contents", "styles"):
        for number, path in enumerate(sorted((tmp_path / folder).iterdir())):
            Image.new("RGB", (SIDE, SIDE), (51 * (number + 1),) * 3).save(path)
    metrics = StyleMetrics(open_tests(settings), settings, measure)
    found = give(metrics, torch.full((6, 3, SIDE, SIDE), 0.8)).compute()
    assert list(found) == ["style_loss", "content_loss", "ssim"]
    # Contents are 0.2 and 0.4, styles 0.2, 0.4 and 0.6.
    assert found["style_loss"] == pytest.approx((0.6 + 0.4 + 0.2) / 3, abs=1e-6)
    assert found["content_loss"] == pytest.approx((0.6 + 0.4) / 2, abs=1e-6)
    flat = [(2 * x * y + 1e-4) / (x * x + y * y + 1e-4) for x, y in ((0.2, 0.8), (0.4, 0.8))]
    assert found["ssim"] == pytest.approx(sum(flat) / 2, abs=1e-3)


def test_ssim_is_of_luminance_and_to_the_content(tmp_path: Path) -> None:
    settings = config(tmp_path)
    test = open_tests(settings)
    contents = torch.stack([test[0, number][0] for number in range(6)])
    assert give(StyleMetrics(test, settings, measure), contents).compute()["ssim"] == pytest.approx(1)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (contents * weights).sum(1, keepdim=True).expand_as(contents)
    assert give(StyleMetrics(test, settings, measure), grey).compute()["ssim"] == pytest.approx(1, abs=1e-4)
    styles = torch.stack([test[0, number][1] for number in range(6)])
    assert give(StyleMetrics(test, settings, measure), styles).compute()["ssim"] < 0.5


def test_pictures_are_cut_off_at_0_and_1_and_may_be_of_half_precision(tmp_path: Path, toy_weights: Path) -> None:
    settings = config(tmp_path, lpips="alex", fid_weights=str(toy_weights))
    test = open_tests(settings)
    beyond = pictures(test) * 4 - 1
    found = [give(StyleMetrics(test, settings, measure), each).compute() for each in (beyond, beyond.clamp(0, 1))]
    # Every LPIPS has random weights of its own.
    assert {**found[0], "lpips": 0, "artfid": 0} == {**found[1], "lpips": 0, "artfid": 0}
    half = give(StyleMetrics(test, settings, measure), pictures(test).bfloat16()).compute()
    exact = give(StyleMetrics(test, settings, measure), pictures(test)).compute()
    assert half["ssim"] == pytest.approx(exact["ssim"], abs=1e-2)


@pytest.mark.parametrize(
    "batches",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1, 2, 3], [4, 5]],
        [[5, 3, 1], [0, 4], [2]],
    ],
)
def test_batches_change_no_figure(tmp_path: Path, toy_weights: Path, batches: list[list[int]]) -> None:
    settings = config(tmp_path, lpips="alex", fid_weights=str(toy_weights))
    test = open_tests(settings)
    metrics, whole = (StyleMetrics(test, settings, measure) for _ in range(2))
    assert metrics._lpips is not None
    assert whole._lpips is not None
    whole._lpips.load_state_dict(metrics._lpips.state_dict())
    whole._lpips.net = metrics._lpips.net
    found = give(metrics, pictures(test), *batches).compute()
    assert list(found) == ["style_loss", "content_loss", "ssim", "lpips", "fid", "artfid"]
    assert found == pytest.approx(give(whole, pictures(test)).compute(), rel=1e-5)


def test_lpips_is_0_for_the_content_itself(tmp_path: Path, toy_weights: Path) -> None:
    settings = config(tmp_path, lpips="alex")
    test = open_tests(settings)
    metrics = StyleMetrics(test, settings, measure)
    contents = torch.stack([test[0, number][0] for number in range(6)])
    found = give(metrics, contents).compute()
    assert list(found) == ["style_loss", "content_loss", "ssim", "lpips"]
    assert found["lpips"] == pytest.approx(0, abs=1e-6)
    metrics = StyleMetrics(test, settings, measure)
    assert metrics._lpips is not None
    wanted = metrics._lpips.net(2 * pictures(test) - 1, 2 * contents - 1).mean()  # it sees -1 to 1
    assert wanted > 1e-4
    assert give(metrics, pictures(test)).compute()["lpips"] == pytest.approx(float(wanted), rel=1e-4)


def test_fid_is_to_all_paintings_and_makes_artfid(tmp_path: Path, toy_weights: Path) -> None:
    settings = config(tmp_path, lpips="alex", fid_weights=str(toy_weights))
    test = open_tests(settings)
    found = give(StyleMetrics(test, settings, measure), pictures(test)).compute()

    def moments(images: list[Tensor]) -> tuple[Any, Any]:
        read = [torch.from_numpy(as_pixels(image)).permute(2, 0, 1) for image in images]
        features = ToyInception()(torch.stack(read)).numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    (mean, spread), (other_mean, other_spread) = moments([test.style(n) for n in range(3)]), moments([*pictures(test)])
    apart = ((mean - other_mean) ** 2).sum()
    wanted = apart + np.trace(spread + other_spread - 2 * sqrtm(spread @ other_spread).real)
    assert wanted > 0.1
    assert found["fid"] == pytest.approx(wanted, rel=1e-4), "each painting once"
    assert found["artfid"] == (1 + found["lpips"]) * (1 + found["fid"])


def test_no_other_rank_is_asked(tmp_path: Path, toy_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(*_: Any) -> None:
        raise AssertionError("the other ranks do not evaluate")

    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", gather)
    settings = config(tmp_path, lpips="alex", fid_weights=str(toy_weights))
    test = open_tests(settings)
    assert give(StyleMetrics(test, settings, measure), pictures(test)).compute()["fid"] > 0


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 5], [5]]])
def test_pairs_that_are_missing_or_come_twice_are_noticed(tmp_path: Path, batches: list[list[int]]) -> None:
    settings = config(tmp_path)
    metrics = StyleMetrics(open_tests(settings), settings, measure)
    give(metrics, pictures(metrics.test), *batches)
    with pytest.raises(AssertionError, match="not every pair once"):
        metrics.compute()


def test_the_sheet_has_contents_at_the_left_and_styles_above(tmp_path: Path) -> None:
    settings = config(tmp_path, sheet=2)
    metrics = StyleMetrics(open_tests(settings), settings, measure)
    flat = torch.arange(1, 7).view(6, 1, 1, 1).expand(6, 3, SIDE, SIDE) / 10
    give(metrics, flat, [4, 0, 3], [1, 2, 5]).save(tmp_path / "new/folder")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["sheet.png"]
    sheet = np.asarray(Image.open(tmp_path / "new/folder/sheet.png"))
    side = (sheet.shape[0] - 2 * GAP) // 3
    assert sheet.shape == (3 * side + 2 * GAP, 3 * side + 2 * GAP, 3), "2 of 3 styles"
    middles = sheet[side // 2 :: side + GAP, side // 2 :: side + GAP, 0]
    # Pairs 0 and 1 are of the first content, pairs 3 and 4 of the second.
    assert (middles[1:, 1:] == np.array([[26, 51], [102, 128]])).all()
    top, left = sheet[:side, side + GAP :], sheet[side + GAP :, :side]
    means = [metrics.test.style(0), metrics.test.style(1), metrics.test.content(0), metrics.test.content(1)]
    squares = [top[:, :side], top[:, side + GAP :], left[:side], left[side + GAP :]]
    for square, image in zip(squares, means, strict=True):
        assert square.mean((0, 1)) / 255 == pytest.approx(image.mean((1, 2)).numpy(), abs=0.01)


def test_a_sheet_has_what_there_is(tmp_path: Path) -> None:
    settings = config(tmp_path, sheet=5)
    metrics = StyleMetrics(open_tests(settings), settings, measure)
    give(metrics, pictures(metrics.test)).save(tmp_path)
    height, width, _ = np.asarray(Image.open(tmp_path / "sheet.png")).shape
    assert (height + GAP) * 4 == (width + GAP) * 3


def test_no_sheet_no_folder(tmp_path: Path) -> None:
    settings = config(tmp_path, sheet=0)
    metrics = StyleMetrics(open_tests(settings), settings, measure)
    give(metrics, pictures(metrics.test)).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_for_lpips_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", nothing)
    settings = config(tmp_path, lpips="alex")
    with pytest.raises(ValueError, match=r"^data.lpips: alex and its weights,.* into \S+, .*: OSError: no network$"):
        StyleMetrics(open_tests(settings), settings, measure)
    settings.lpips = "resnet"
    with pytest.raises(ValueError, match=r"^data.lpips: resnet .* must be one of .*$"):
        StyleMetrics(open_tests(settings), settings, measure)


def test_weights_for_fid_that_are_not_there(tmp_path: Path, toy_weights: Path) -> None:
    settings = config(tmp_path, lpips="alex", fid_weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(ValueError, match=r"^data.fid_weights: there is no file .*nowhere.pth$"):
        StyleMetrics(open_tests(settings), settings, measure)
    settings = config(tmp_path, lpips="alex", fid_weights=str(toy_weights), tests=1)
    with pytest.raises(ValueError, match=r"^data.fid_weights: FID needs at least 2 test paintings, and there is 1"):
        StyleMetrics(open_tests(settings), settings, measure)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"no weights", {"fc.bias": torch.zeros(3)}, torch.zeros(3), "touch"])
def test_files_without_inceptions_weights_are_named(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(Touch(tmp_path / "touched") if content == "touch" else content, file)
    with pytest.raises(ValueError, match=r"^data.fid_weights: \S+weights.pth does not hold the weights of .*Inception"):
        load_fid(file, 2)
    assert not (tmp_path / "touched").exists(), "nothing is run that the file says"


def test_fid_without_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"^data.fid_weights: FID needs torch-fidelity; pip install torch-fidelity$"):
        load_fid(tmp_path / "weights.pth", 2)
