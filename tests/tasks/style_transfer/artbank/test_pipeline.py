"""ArtBank's pipeline beside diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.diffusion.bank import PromptBank
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.diffusion.batch import batch_of
from tests.tasks.style_transfer import pipelines as p
from tests.tasks.style_transfer.painters import noise


@pytest.mark.parametrize("form", ["ssam", "released"])
@pytest.mark.parametrize("guidance", [1.0, 10.0])
def test_without_inversion_it_is_diffusers_own_to_the_bit(checkpoint: Path, form: str, guidance: float) -> None:
    made = p.pipeline("artbank", checkpoint, "monet", form=form)
    plain = StableDiffusionImg2ImgPipeline(**made.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    image = Image.fromarray(noise(32, 64))
    given = {"strength": 0.7, "guidance_scale": guidance, "num_inference_steps": p.STEPS, "output_type": "latent"}
    expected = plain(
        image=batch_of("image", image),  # of another layout in memory convolutions are rounded otherwise
        prompt_embeds=p.texts(made, "monet", 0, 0),
        negative_prompt="",
        generator=torch.Generator().manual_seed(2),
        **given,
    ).images
    found = made(image, "monet", generator=torch.Generator().manual_seed(2), inversion="none", **given).images
    assert torch.equal(found, expected)


def test_the_prompt_is_the_template_with_the_learnt_vectors(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet", tokens=2, rows=8)
    with p.calls(made.unet) as seen:
        p.paint(made)
    assert len(seen) == 1 + 5
    torch.testing.assert_close(seen[0]["encoder_hidden_states"], p.texts(made, "monet", 0, 0))
    for call in seen[1:]:
        torch.testing.assert_close(
            call["encoder_hidden_states"], torch.cat([p.no_text(made), p.texts(made, "monet", 0, 0)])
        )


def test_made_of_parts_with_a_bank() -> None:
    base = Base("tiny")
    bank = PromptBank("artbank")
    bank.add("monet", p.prompt("artbank"))
    made = ArtBankPipeline(base.vae(), base.text_encoder(), base.tokenizer, base.unet(), base.sampler(), bank=bank)
    made.set_progress_bar_config(disable=True)
    assert made.bank is bank
    assert made.safety_checker is None
    p.paint(made)
