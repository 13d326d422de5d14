"""Calls of the pipelines, as people write them who know diffusers' own image-to-image pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from tests.tasks.style_transfer import pipelines as p

both = pytest.mark.parametrize("method", p.METHODS)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@both
@pytest.mark.parametrize("inversion", ["stochastic", pytest.param("none", marks=pytest.mark.slow)])
def test_sides_that_are_multiples_of_8_are_enough(checkpoint: Path, method: str, inversion: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    made = p.pipeline(method, checkpoint, "monet", controlnet=p.controlnet(made.unet) if method == "lsast" else None)
    for height, width in ((40, 72), (8, 24), (104, 8)):
        painted = p.paint(made, image=p.content(1, height, width), inversion=inversion, output_type="pt")
        assert painted.shape == (1, 3, height, width)
        assert painted.isfinite().all()


def test_such_sides_paint_as_diffusers_own_to_the_bit(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    plain = StableDiffusionImg2ImgPipeline(**made.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    given = {"strength": 0.7, "guidance_scale": 3.0, "num_inference_steps": p.STEPS, "output_type": "latent"}
    image = p.content(2, 40, 72)
    expected = plain(
        image=image,
        prompt_embeds=p.texts(made, "monet", 0, 0).expand(2, -1, -1),
        negative_prompt_embeds=p.no_text(made).expand(2, -1, -1),
        generator=generators(1, 2),
        **given,
    ).images
    found = made(image, "monet", inversion="none", generator=generators(1, 2), **given).images
    assert torch.equal(found, expected)


@both
def test_several_pictures_of_each(checkpoint: Path, method: str) -> None:
    """They follow one another, as if every picture had been given so many times."""
    made = p.pipeline(method, checkpoint, "monet")
    made = p.pipeline(method, checkpoint, "monet", controlnet=p.controlnet(made.unet) if method == "lsast" else None)
    image, given = p.content(2), {"num_inference_steps": 4, "output_type": "latent"}
    more: dict[str, Any] = {"control_image": p.content(2, seed=3)} if method == "lsast" else {}
    found = made(image, "monet", num_images_per_prompt=2, generator=generators(1, 2, 3, 4), **more, **given).images
    more = {name: each.repeat_interleave(2, 0) for name, each in more.items()}
    twice = image.repeat_interleave(2, 0)
    assert torch.equal(found, made(twice, "monet", generator=generators(1, 2, 3, 4), **more, **given).images)
    assert len(p.paint(made, strength=0, num_images_per_prompt=3)) == 3


@both
def test_no_negative_prompt_is_the_empty_one(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    assert torch.equal(p.paint(made, negative_prompt=None), p.paint(made))


@both
def test_every_kind_of_picture_gives_every_kind_of_output(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    array = (p.content()[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    kinds = (Image.fromarray(array), array, array[None], tensor, tensor[None], [Image.fromarray(array)], [tensor])
    first = p.paint(made, image=kinds[0], num_inference_steps=2, output_type="np")
    assert first.shape == (1, 32, 64, 3)
    for each in kinds[1:]:
        assert np.array_equal(p.paint(made, image=each, num_inference_steps=2, output_type="np"), first)
    (picture,) = p.paint(made, image=tensor, num_inference_steps=2, output_type="pil")
    assert picture.size == (64, 32)


@both
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"generator": generators(0)}, r"^generator: a list of 1 for 2 pictures; give one, or one per picture$"),
        ({"generator": tuple(generators(0, 1, 2))}, r"^generator: a list of 3 for 2 pictures; give one, or"),
        (
            {"generator": generators(0, 1), "num_images_per_prompt": 2},
            r"^generator: a list of 2 for 4 pictures; give one, or",
        ),
        ({"strength": 0, "generator": generators(0)}, r"^generator: a list of 1 for 2 pictures"),
        ({"num_images_per_prompt": 0}, r"^num_images_per_prompt: 0 is too small; the least is 1$"),
        ({"output_type": "jpeg"}, r"^output_type: 'jpeg' is none of pil, np, pt, latent$"),
        ({"negative_prompt": ["ugly", "blurred"]}, r"^negative_prompt: \['ugly', 'blurred'\] is no text; a call has"),
        (
            {"callback_on_step_end_tensor_inputs": ["latent"]},
            r"^callback_on_step_end_tensor_inputs: 'latent' is none of latents, .*; did you mean 'latents'\?$",
        ),
        ({"image": None}, r"^image: NoneType is not a picture"),
        ({"image": p.content(1, 36, 64)}, r"^image: 64 x 36 px; sides must be multiples of 8; resize or pad it"),
        ({"image": torch.zeros(1, 4, 4, 8)}, r"^image: has shape \(1, 4, 4, 8\); give \(3, H, W\)"),
        ({"image": p.content() * 2 - 1}, r"^image: has values from -"),
        ({"image": [p.content(), p.content(1, 64, 32)]}, r"^image: the pictures have 32 x 64, 64 x 32 px; give one"),
        ({"artist": ["monet", "monet"]}, r"^artist: \['monet', 'monet'\] is not a name; a call paints in one artist's"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(
    checkpoint: Path, method: str, given: dict[str, Any], said: str
) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    words = {"image": p.content(2), "artist": "monet", **given}
    with (
        p.calls(made.unet) as denoised,
        p.calls(made.text_encoder) as read,
        p.calls(made.vae) as seen,
        pytest.raises(ValueError, match=said) as caught,
    ):
        made(words.pop("image"), words.pop("artist"), **words)
    assert (denoised, read, seen) == ([], [], [])
    assert "\n" not in str(caught.value)
