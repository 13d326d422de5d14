"""The stochastic inversion, recomputed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from tests.tasks.style_transfer import pipelines as p


def latents(made: Any, image: Tensor, generator: torch.Generator) -> Tensor:
    encoded = made.vae.encode(image * 2 - 1)
    if hasattr(encoded, "latents"):
        return encoded.latents * made.vae.config.scaling_factor
    of = encoded.latent_dist
    return (of.mean + of.std * torch.randn(of.mean.shape, generator=generator)) * made.vae.config.scaling_factor


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", p.METHODS)
def test_the_three_formulas(checkpoint: Path, method: str, kind: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config, prediction_type=kind)
    with p.calls(made.unet) as seen:
        p.paint(made, guidance_scale=1, strength=0.5, seed=3)
    assert len(seen) == 1 + p.STEPS // 2, "one prediction more than steps"

    generator = torch.Generator().manual_seed(3)
    z = latents(made, p.content(), generator)
    made.scheduler.set_timesteps(p.STEPS)
    t = made.scheduler.timesteps[p.STEPS // 2]
    a = made.scheduler.alphas_cumprod[t]
    noised = a.sqrt() * z + (1 - a).sqrt() * torch.randn(z.shape, generator=generator)
    torch.testing.assert_close(seen[0]["x"], noised)
    assert seen[0]["t"] == t
    assert torch.equal(seen[0]["encoder_hidden_states"], seen[1]["encoder_hidden_states"]), "its time's own prompt"
    found = made.unet(noised, t, encoder_hidden_states=seen[0]["encoder_hidden_states"]).sample
    if kind == "v_prediction":
        found = a.sqrt() * found + (1 - a).sqrt() * noised
    start = a.sqrt() * z + (1 - a).sqrt() * found
    torch.testing.assert_close(seen[1]["x"], start)
    assert not torch.allclose(start, noised, atol=0.1)


@torch.no_grad()
def test_an_exact_denoiser_of_v_finds_the_noise_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config, prediction_type="v_prediction")
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([481])
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(made, "content_latents", lambda *_: z)
    monkeypatch.setattr(made, "predict", lambda x, t: made.scheduler.get_velocity(z, noise, t))
    made.inversion = "stochastic"
    rest = 1, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)
    found = made.prepare_latents(torch.zeros(1, 3, 32, 32), t, *rest)
    torch.testing.assert_close(found, made.scheduler.add_noise(z, noise, t))


@torch.no_grad()
def test_latents_of_a_plain_autoencoder_are_drawn(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    torch.manual_seed(0)
    made.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    with p.calls(made.unet) as seen:
        p.paint(made, guidance_scale=1, strength=0.5, seed=3)
    generator = torch.Generator().manual_seed(3)
    z = latents(made, p.content(), generator)
    a = made.scheduler.alphas_cumprod[seen[0]["t"]]
    torch.testing.assert_close(seen[0]["x"], a.sqrt() * z + (1 - a).sqrt() * torch.randn(z.shape, generator=generator))


@pytest.mark.parametrize("inversion", ["stochastic", "none"])
def test_each_picture_may_have_a_generator(checkpoint: Path, inversion: str) -> None:
    made, two = p.pipeline("artbank", checkpoint, "monet"), p.content(2)
    options = {"num_inference_steps": 4, "output_type": "latent", "inversion": inversion}
    both = made(two, "monet", generator=[torch.Generator().manual_seed(n) for n in (1, 2)], **options).images
    for number in range(2):
        one = made(two[number], "monet", generator=torch.Generator().manual_seed(number + 1), **options).images
        torch.testing.assert_close(both[number], one[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_what_it_does_not_know_is_refused(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    made.scheduler = EulerDiscreteScheduler.from_config(made.scheduler.config, prediction_type="v_prediction")
    said = r"^inversion: a EulerDiscreteScheduler that predicts v_prediction is unknown to it; take a DDIMScheduler, or"
    with pytest.raises(ValueError, match=said):
        p.paint(made)
    p.paint(made, inversion="none")
