"""The contact sheet that an evaluation makes, and the figures of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image import FrechetInceptionDistance

from engine.utilities.seed import derive
from tasks.style_transfer.clip import CLIPFeatures
from tasks.style_transfer.diffusion import pictures
from tasks.style_transfer.diffusion.pictures import Repainting
from tasks.style_transfer.diffusion.prompt_config import PicturesConfig
from tasks.style_transfer.images import as_pixels
from tasks.style_transfer.sheet import GAP, SIDE
from tasks.style_transfer.structure import edge_ssim

Paint = Callable[[Tensor, str], Tensor]


class Fake:
    """As much of a pipeline as is asked for; notes what it is asked."""

    def __init__(self, paint: Paint = lambda content, artist: content) -> None:
        self.paint = paint
        self.asked: list[tuple[str, Tensor, dict[str, Any]]] = []
        self.states: list[Tensor] = []

    def __call__(self, image: Tensor, artist: str, *, generator: torch.Generator, **options: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.asked.append((artist, image, options))
        self.states.append(generator.get_state())
        torch.rand(3, generator=generator)
        return SimpleNamespace(images=self.paint(image, artist))


def smooth(count: int, seed: int, side: int = 64) -> list[Tensor]:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [*F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)]


def settings(**changes: Any) -> PicturesConfig:
    return PicturesConfig(**{"strength": 0.6, "guidance": 3.0, "steps": 7, "inversion": "none", **changes})


CONTENTS, WORKS = smooth(3, 0), {"monet": smooth(2, 1), "van gogh": smooth(1, 2)}


def repainting(seed: int = 5, **changes: Any) -> Repainting:
    return Repainting(CONTENTS, WORKS, settings(**changes), seed)


def test_every_photograph_by_every_artist_as_the_settings_say(tmp_path: Path) -> None:
    pipeline = Fake()
    repainting()(pipeline, tmp_path)
    assert [artist for artist, *_ in pipeline.asked] == ["monet"] * 3 + ["van gogh"] * 3
    for number, (_, image, options) in enumerate(pipeline.asked):
        assert torch.equal(image, CONTENTS[number % 3][None])
        wanted = {"strength": 0.6, "guidance_scale": 3.0, "num_inference_steps": 7, "inversion": "none"}
        assert options == {**wanted, "output_type": "pt"}


def test_the_noise_hangs_on_seed_artist_and_number_alone(tmp_path: Path) -> None:
    def states(repaint: Repainting) -> list[Tensor]:
        torch.rand(1)
        pipeline = Fake()
        repaint(pipeline, tmp_path)
        return pipeline.states

    found = states(repainting())
    for number, state in enumerate(found):
        seed = derive(5, "picture", ["monet", "van gogh"][number // 3], number % 3)
        assert torch.equal(state, torch.Generator().manual_seed(seed).get_state())
    assert all(torch.equal(*pair) for pair in zip(found, states(repainting()), strict=True))
    fewer = states(Repainting(CONTENTS[:2], {"van gogh": WORKS["van gogh"]}, settings(strength=1.0), 5))
    assert all(torch.equal(*pair) for pair in zip(fewer, found[3:5], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(found, states(repainting(seed=6)), strict=True))


def test_the_sheet_has_photographs_at_the_left_and_a_work_above(tmp_path: Path) -> None:
    shades = {"monet": 0.2, "van gogh": 0.8}
    repainting()(Fake(lambda content, artist: content * 0 + shades[artist]), tmp_path / "new/folder")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["sheet.png"]
    sheet = np.asarray(Image.open(tmp_path / "new/folder/sheet.png"))
    step = SIDE + GAP
    assert sheet.shape == (4 * step - GAP, 3 * step - GAP, 3)

    def square(row: int, column: int) -> Any:
        """Of the double size that a sheet shows pictures of 64 px in, one in two pixels."""
        return sheet[row * step : row * step + SIDE, column * step : column * step + SIDE].astype(float)

    assert (square(0, 0) == 255).all()
    for number, content in enumerate(CONTENTS):
        small = F.interpolate(content[None], (SIDE, SIDE), mode="bicubic").clamp(0, 1)[0]
        assert np.abs(square(number + 1, 0) - as_pixels(small)).mean() < 3
        for column, shade in enumerate(shades.values()):
            assert (square(number + 1, column + 1) == round(255 * shade)).all()
    for column, works in enumerate(WORKS.values()):
        small = F.interpolate(works[0][None], (SIDE, SIDE), mode="bicubic").clamp(0, 1)[0]
        assert np.abs(square(0, column + 1) - as_pixels(small)).mean() < 3


def test_the_photographs_themselves_keep_all_of_their_edges(tmp_path: Path) -> None:
    found = repainting()(Fake(), tmp_path)
    assert list(found) == ["edge_ssim", "seconds_a_picture"]
    assert found["edge_ssim"] == pytest.approx(1, abs=1e-6)
    assert 0 < found["seconds_a_picture"] < 5


def test_edges_are_those_of_each_pictures_own_photograph(tmp_path: Path) -> None:
    def half(content: Tensor, artist: str) -> Tensor:
        return content.lerp(WORKS[artist][0][None], 0.5)

    found = repainting()(Fake(half), tmp_path)
    wanted = [edge_ssim(half(each[None], artist), each[None]) for artist in WORKS for each in CONTENTS]
    assert found["edge_ssim"] == pytest.approx(float(torch.cat(wanted).mean()), abs=1e-6)
    assert found["edge_ssim"] < 0.9


def test_pictures_in_half_precision(tmp_path: Path) -> None:
    found = repainting()(Fake(lambda content, artist: content.half()), tmp_path)
    assert found["edge_ssim"] == pytest.approx(1, abs=1e-2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small, untrained CLIP in a folder."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


def test_pictures_that_are_the_artists_only_work_are_as_like_as_can_be(tmp_path: Path, clip: str) -> None:
    works = {"monet": smooth(1, 1), "van gogh": smooth(1, 2)}
    repaint = Repainting(CONTENTS, works, settings(clip=clip), 0)
    found = repaint(Fake(lambda content, artist: works[artist][0][None]), tmp_path)
    assert list(found) == ["edge_ssim", "seconds_a_picture", "clip"]
    assert found["clip"] == pytest.approx(1, abs=1e-5)
    swapped = {"monet": "van gogh", "van gogh": "monet"}
    other = repaint(Fake(lambda content, artist: works[swapped[artist]][0][None]), tmp_path)
    assert other["clip"] < 1 - 1e-4


def test_likeness_is_to_the_mean_of_an_artists_works(tmp_path: Path, clip: str) -> None:
    """All of unit length, by hand."""
    found = repainting(clip=clip)(Fake(lambda content, artist: content.flip(2)), tmp_path)
    features = CLIPFeatures(clip)

    def unit(picture: Tensor) -> Tensor:
        with torch.no_grad():
            embedding = features(picture[None])[0]
        return embedding / embedding.norm()

    cosines = []
    for works in WORKS.values():
        mean = sum(map(unit, works)) / len(works)
        cosines += [float(unit(each.flip(1)) @ mean / mean.norm()) for each in CONTENTS]
    assert found["clip"] == pytest.approx(sum(cosines) / 6, abs=1e-5)


def test_lpips_is_of_each_picture_to_its_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights; only the course of it counts here."""
    from torchmetrics.functional.image import lpips  # above it would come before torchvision's operators

    real = lpips._get_tv_model_features
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: real(net, False))
    torch.manual_seed(0)
    repaint = repainting(lpips="alex")
    assert repaint(Fake(), tmp_path)["lpips"] == pytest.approx(0, abs=1e-6)
    found = repaint(Fake(lambda content, artist: content.flip(3)), tmp_path)
    assert list(found) == ["edge_ssim", "seconds_a_picture", "lpips"]
    assert repaint._lpips is not None
    with torch.no_grad():
        stacked = torch.stack(CONTENTS) * 2 - 1  # it sees -1 to 1
        wanted = float(repaint._lpips.net(stacked.flip(3), stacked).mean())
    assert wanted > 1e-4
    assert found["lpips"] == pytest.approx(wanted, rel=1e-3)


class ToyInception(nn.Module):
    """Mean of red and of green: 2 features."""

    num_features = 2

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images[:, :2].double().mean((2, 3)) / 50


def test_fid_is_of_all_pictures_to_all_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*given: Any) -> FrechetInceptionDistance:
        asked.append(given)
        return FrechetInceptionDistance(ToyInception())

    monkeypatch.setattr(pictures, "load_fid", load)
    found = repainting(fid_weights="inception.pth")(Fake(), tmp_path)
    assert asked == [(Path("inception.pth"), 3, "pictures.fid_weights")]
    assert list(found) == ["edge_ssim", "seconds_a_picture", "fid"]
    by_hand = FrechetInceptionDistance(ToyInception())
    for real, images in ((True, [*WORKS["monet"], *WORKS["van gogh"]]), (False, CONTENTS * 2)):
        by_hand.update((torch.stack(images) * 255).round().to(torch.uint8), real=real)
    assert found["fid"] == pytest.approx(float(by_hand.compute()), rel=1e-5)
    assert found["fid"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "works", "said"),
    [
        ({"clip": "/nowhere"}, WORKS, r"^pictures.clip: no CLIP model can be loaded from '/nowhere': "),
        ({"lpips": "alex"}, WORKS, r"^pictures.lpips: alex and its weights, .*cannot be loaded: OSError: no network$"),
        ({"fid_weights": "/nowhere"}, WORKS, r"^pictures.fid_weights: there is no file /nowhere$"),
        (
            {"fid_weights": "/nowhere"},
            {"a": WORKS["monet"][:1]},
            r"^pictures.fid_weights: FID needs at least 2 test paintings, ",
        ),
        ({"fid_weights": __file__}, WORKS, r"^pictures.fid_weights: \S+test_pictures.py does not hold the weights of"),
    ],
)
def test_weights_that_cannot_be_had_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], works: dict[str, list[Tensor]], said: str
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.alexnet", offline)
    with pytest.raises(ValueError, match=said) as error:
        Repainting(CONTENTS, works, settings(**changes), 0)
    assert "\n" not in str(error.value)
