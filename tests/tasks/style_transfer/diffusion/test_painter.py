"""Repainting photographs of any size in an artist's style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.utilities.seed import derive
from tasks.style_transfer.diffusion.painter import ArtistPainter
from tasks.style_transfer.diffusion.prompt_config import PicturesConfig
from tasks.style_transfer.images import as_pixels, as_tensor, write_image
from tasks.style_transfer.stylize import paint_whole
from tests.tasks.style_transfer import pipelines as p
from tests.tasks.style_transfer.painters import noise, slope

SETTINGS = PicturesConfig(strength=0.6, guidance=2.0, steps=5, inversion="none")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=p.METHODS)
def painter(request: pytest.FixtureRequest, checkpoint: Path) -> ArtistPainter:
    made = p.pipeline(request.param, checkpoint, "monet", "cezanne")
    # Untrained, it paints all but black; stretched, pictures differ.
    with torch.no_grad():
        made.vae.decoder.layers[-1].weight.mul_(30)
    return ArtistPainter(made, SETTINGS)


def test_it_paints_as_its_settings_say(painter: ArtistPainter) -> None:
    content = p.content()
    found = painter.paint(content, "monet", name="hill", alpha=0.8, seed=3)
    wanted = painter.pipeline(
        content,
        "monet",
        strength=0.8,
        guidance_scale=2.0,
        num_inference_steps=5,
        inversion="none",
        generator=torch.Generator().manual_seed(derive(3, "hill", "monet")),
        output_type="pt",
    ).images
    assert torch.equal(found, wanted)
    assert (painter.alpha, painter.artists, painter.multiple) == (0.6, ["monet", "cezanne"], 8)


def test_the_noise_depends_on_seed_name_and_artist_alone(painter: ArtistPainter) -> None:
    content, given = p.content(), {"artist": "monet", "name": "hill", "alpha": 0.8, "seed": 0}
    first = painter.paint(content, **given)
    torch.rand(3)
    assert torch.equal(first, painter.paint(content, **given))
    for change in ({"artist": "cezanne"}, {"name": "tower"}, {"seed": 1}, {"alpha": 0.4}):
        assert not torch.equal(first, painter.paint(content, **{**given, **change}))


@pytest.mark.parametrize(("height", "width"), [(32, 64), (33, 70), (5, 9), (1, 1)])
def test_pictures_of_any_size(painter: ArtistPainter, height: int, width: int) -> None:
    content = slope(height, width) if height > 1 else noise(1, 1)
    found = paint_whole(painter, content, "monet", name="hill", device=CPU, alpha=1.0)
    assert found.shape == content.shape
    assert found.dtype == np.uint8


def test_what_was_added_at_the_sides_is_cut_off(painter: ArtistPainter, monkeypatch: pytest.MonkeyPatch) -> None:
    content = noise(40, 50)
    monkeypatch.setattr(painter.pipeline.__class__, "__call__", _copy)
    assert (paint_whole(painter, content, "monet", name="hill", device=CPU, alpha=1.0) == content).all()


def test_colours_are_kept_if_asked_for(painter: ArtistPainter) -> None:
    content = slope(32, 32)
    plain, kept = (
        as_tensor(paint_whole(painter, content, "monet", name="a", device=CPU, alpha=1.0, keep_colour=keep))
        for keep in (False, True)
    )
    chroma = [picture[0] - picture[2] for picture in (as_tensor(content), plain, kept)]
    assert (chroma[2] - chroma[0]).abs().mean() < (chroma[1] - chroma[0]).abs().mean() / 2


def test_a_work_is_shown_where_there_is_one(painter: ArtistPainter, tmp_path: Path) -> None:
    write_image(tmp_path / "garden.png", noise(8, 8))
    shown = ArtistPainter(painter.pipeline, works={"monet": tmp_path / "garden.png"})
    assert (shown.work("monet") == noise(8, 8)).all()
    assert shown.work("cezanne") is None


def _copy(_: Any, image: torch.Tensor, artist: str, **__: Any) -> Any:
    assert image.shape == (1, 3, 40, 56)
    assert (as_pixels(image[0])[:40, :50] == noise(40, 50)).all()

    class Output:
        images = image

    return Output
