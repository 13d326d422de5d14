"""LSAST's pipeline: stages, layers and the ControlNet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch import Tensor, nn

from tasks.style_transfer.diffusion.base import Base, quiet
from tasks.style_transfer.diffusion.conditioner import Conditioner
from tasks.style_transfer.images import as_pixels, as_tensor
from tasks.style_transfer.lsast.canny import canny
from tasks.style_transfer.lsast.control import NoControl
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tasks.style_transfer.lsast.routing import PartOfPrompt, route
from tests.tasks.style_transfer import pipelines as p

FORMS = pytest.mark.parametrize("form", ["paper", "released"])


def controlled(checkpoint: Path, *artists: str, **settings: Any) -> Any:
    network = p.controlnet(p.pipeline("lsast", checkpoint).unet)
    return p.pipeline("lsast", checkpoint, *artists, controlnet=network, **settings)


def shapes() -> Tensor:
    """A picture with edges."""
    picture = torch.zeros(1, 3, 32, 64)
    picture[..., 8:24, 10:40] = 0.8
    return picture


def three(made: Any, stage: int, artist: str = "monet") -> Tensor:
    return torch.cat([p.texts(made, artist, stage, layer) for layer in range(3)], 1)


@FORMS
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 10.0])
def test_with_one_stage_it_is_diffusers_own_to_the_bit(checkpoint: Path, form: str, guidance: float) -> None:
    made = controlled(checkpoint, "monet", form=form, stages=1)
    image = as_pixels(shapes()[0])
    given = {"strength": 0.7, "guidance_scale": guidance, "num_inference_steps": p.STEPS, "output_type": "latent"}
    given["controlnet_conditioning_scale"] = 0.8
    seed = torch.Generator().manual_seed
    found = made(shapes(), "monet", generator=seed(2), inversion="none", **given).images

    fresh = controlled(checkpoint)
    route(fresh.unet, form)
    route(fresh.controlnet, form)
    plain = StableDiffusionControlNetImg2ImgPipeline(**fresh.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        image=shapes(),
        control_image=as_tensor(canny(image))[None],
        prompt_embeds=three(made, 0),
        negative_prompt_embeds=p.no_text(made).repeat(1, 3, 1),
        generator=seed(2),
        **given,
    ).images
    assert torch.equal(found, expected)


def test_each_step_reads_the_prompts_of_its_stage(checkpoint: Path) -> None:
    made = controlled(checkpoint, "monet", stages=4)
    with p.calls(made.unet) as seen, p.calls(made.controlnet) as control:
        p.paint(made, strength=1.0)
    # DDIM's times of 8 steps are 876, 751, 626, 501, 376, 251, 126 and 1; the inversion's is the first.
    times = [876, 876, 751, 626, 501, 376, 251, 126, 1]
    assert [int(call["t"].max()) for call in seen] == times
    nothing = p.no_text(made).repeat(1, 3, 1)
    for t, call, other in zip(times, seen, control, strict=True):
        wanted = three(made, t * 4 // 1000)
        if call is not seen[0]:
            wanted = torch.cat([nothing, wanted])
        torch.testing.assert_close(call["encoder_hidden_states"], wanted)
        assert torch.equal(call["encoder_hidden_states"], other["encoder_hidden_states"])
    stages = [call["encoder_hidden_states"][-1] for call in seen]
    assert torch.equal(stages[2], stages[1])
    assert not torch.allclose(stages[3], stages[2], atol=1e-2)


def test_it_reads_what_training_reads(checkpoint: Path) -> None:
    made = p.pipeline("lsast", checkpoint, "monet", "cezanne", stages=4)
    conditioner = Conditioner(made.bank, made.text_encoder, made.tokenizer, 1000).eval()
    with p.calls(made.unet) as seen:
        p.paint(made, "cezanne", strength=1.0)
    for call in seen[1:]:
        rows = torch.tensor([conditioner.nothing, list(made.bank).index("cezanne")])
        with torch.no_grad():
            expected = conditioner(rows, call["t"].expand(2), rows.tolist())
        torch.testing.assert_close(call["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-4)


class Noting:
    """A processor that notes what its layer reads."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.seen = processor, list[Tensor]()

    def __call__(self, attention: Any, x: Tensor, encoder_hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        self.seen.append(encoder_hidden_states)
        return self.processor(attention, x, encoder_hidden_states, *rest, **more)


def noting(network: nn.Module) -> dict[str, Noting]:
    found = {}
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            found[name] = Noting(module.processor)
            module.set_processor(found[name])
    return found


PARTS = {
    "paper": {"down_blocks.0": 2, "down_blocks.1": 1, "down_blocks.2": 0, "mid_block": 0}
    | {"up_blocks.0": 0, "up_blocks.1": 1, "up_blocks.2": 2},
    "released": {"down_blocks": 0, "mid_block": 1, "up_blocks": 2},
}


@FORMS
def test_each_layer_reads_its_own_prompt(checkpoint: Path, form: str) -> None:
    made = controlled(checkpoint, "monet", form=form, stages=2)
    layers = {**noting(made.unet), **{f"control.{name}": note for name, note in noting(made.controlnet).items()}}
    p.paint(made, strength=1.0, guidance_scale=1)
    used = set()
    for name, note in layers.items():
        place, part = next(
            (place, part) for place, part in PARTS[form].items() if name.removeprefix("control.").startswith(place)
        )
        used.add(place)
        assert len(note.seen) == 9
        torch.testing.assert_close(note.seen[0], p.texts(made, "monet", 1, part))
        torch.testing.assert_close(note.seen[-1], p.texts(made, "monet", 0, part))
    assert used == set(PARTS[form])


def test_artists_of_two_forms_each_read_by_their_own(checkpoint: Path) -> None:
    made = controlled(checkpoint, "monet", form="paper")
    made.bank.add("cezanne", p.prompt("lsast", 1, form="released"))
    paper, released = p.paint(made), p.paint(made, "cezanne")
    assert torch.equal(p.paint(made), paper)
    alone = controlled(checkpoint)
    alone.bank.add("cezanne", p.prompt("lsast", 1, form="released"))
    assert torch.equal(p.paint(alone, "cezanne"), released)
    processor = made.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor
    assert not isinstance(processor.processor, PartOfPrompt), "routed anew, not once more"


def test_a_callback_sees_and_may_change_the_next_steps_prompt(checkpoint: Path) -> None:
    made = p.pipeline("lsast", checkpoint, "monet", stages=8)
    seen: list[Tensor] = []

    def change(_: Any, step: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["prompt_embeds"])
        if step == 2:
            given["prompt_embeds"] = given["prompt_embeds"] * 0
        return given

    with p.calls(made.unet) as calls:
        p.paint(
            made,
            strength=1.0,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
    read = [call["encoder_hidden_states"] for call in calls[1:]]
    for step in range(7):
        if step == 2:
            assert not read[step + 1].any()
        else:
            assert torch.equal(read[step + 1], seen[step])
    torch.testing.assert_close(read[4], torch.cat([p.no_text(made).repeat(1, 3, 1), three(made, 3)]))


def test_guidance_that_a_callback_of_diffusers_ends(checkpoint: Path) -> None:
    made = p.pipeline("lsast", checkpoint, "monet", stages=8)
    end = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    with p.calls(made.unet) as calls:
        p.paint(made, strength=1.0, callback_on_step_end=end)
    assert [len(call["x"]) for call in calls] == [1, 2, 2, 2, 2, 1, 1, 1, 1]
    for call, stage in zip(calls[5:], (3, 2, 1, 0), strict=True):
        torch.testing.assert_close(call["encoder_hidden_states"], three(made, stage))


def test_without_a_controlnet_it_is_one_that_adds_zero_to_the_bit(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = p.pipeline("lsast", checkpoint, "monet")
        first = p.paint(made)
        p.paint(made)
    assert [record.message for record in caplog.records if "lsast" in record.name] == [
        "LSAST without a ControlNet (`controlnet`): only the initial noise preserves the content"
    ]
    assert isinstance(made.controlnet, NoControl)
    assert sum(each.numel() for each in made.controlnet.parameters()) < 1000
    zero = ControlNetModel.from_unet(made.unet)
    caplog.clear()
    other = p.pipeline("lsast", checkpoint, "monet", controlnet=zero)
    assert not [record for record in caplog.records if "lsast" in record.name]
    with p.calls(zero) as seen:
        assert torch.equal(p.paint(other), first)
    assert len(seen) == 6


def test_the_controlnet_sees_the_edges_also_in_the_inversion(checkpoint: Path) -> None:
    made = controlled(checkpoint, "monet")
    expected = as_tensor(canny(as_pixels(shapes()[0])))
    assert expected.any()
    with p.calls(made.controlnet) as seen, p.calls(made.unet) as denoised:
        first = p.paint(made, image=shapes(), controlnet_conditioning_scale=0.5)
    for number, call in enumerate(seen):
        assert torch.equal(call["controlnet_cond"], expected.expand(2 if number else 1, -1, -1, -1))
        assert call["conditioning_scale"] == 0.5
    assert all(call["mid_block_additional_residual"].abs().max() > 1e-3 for call in denoised)
    assert not torch.allclose(first, p.paint(made, image=shapes()), atol=1e-3)
    given = Image.fromarray(as_pixels(expected))
    assert torch.equal(first, p.paint(made, image=shapes(), control_image=given, controlnet_conditioning_scale=0.5)), (
        "the edges, given"
    )
    assert not torch.allclose(
        first, p.paint(made, image=shapes(), control_image=1 - expected, controlnet_conditioning_scale=0.5), atol=1e-3
    )


def test_scale_0_is_no_control(checkpoint: Path) -> None:
    without = p.pipeline("lsast", checkpoint, "monet")
    made = controlled(checkpoint, "monet")
    assert torch.equal(p.paint(made, controlnet_conditioning_scale=0), p.paint(without))


def test_one_control_image_for_several_pictures(checkpoint: Path) -> None:
    made = controlled(checkpoint, "monet")
    one, two = p.content(1, seed=1), p.content(2)
    each = p.paint(made, image=two, control_image=torch.cat([one, one]))
    torch.testing.assert_close(p.paint(made, image=two, control_image=one), each)


def test_with_a_controlnet_it_is_saved_and_loaded(checkpoint: Path, tmp_path: Path) -> None:
    made = controlled(checkpoint, "monet")
    made.save_pretrained(tmp_path / "saved")
    again = p.pipeline("lsast", tmp_path / "saved")
    assert again.controlled
    assert torch.equal(p.paint(made), p.paint(again))
    plain = p.pipeline("lsast", checkpoint, "monet", controlnet=tmp_path / "saved/controlnet")
    assert torch.equal(p.paint(made), p.paint(plain)), "by its folder"
    other = p.controlnet(made.unet, seed=6)
    assert p.pipeline("lsast", tmp_path / "saved", controlnet=other).controlnet is other
    without = p.pipeline("lsast", checkpoint, "monet")
    without.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without/controlnet").exists()
    assert not p.pipeline("lsast", tmp_path / "without").controlled
    assert p.pipeline("lsast", tmp_path / "without", controlnet=other).controlled


def test_a_controlnet_by_name_gets_the_precision_of_the_others(checkpoint: Path, tmp_path: Path) -> None:
    p.controlnet(p.pipeline("lsast", checkpoint).unet).save_pretrained(tmp_path / "control")
    made = LSASTPipeline.from_pretrained(checkpoint, controlnet=tmp_path / "control", torch_dtype=torch.float16)
    assert {made.unet.dtype, made.controlnet.dtype} == {torch.float16}


def test_made_of_parts_with_a_controlnet_by_name(tmp_path: Path) -> None:
    base = Base("tiny")
    unet = base.unet()
    p.controlnet(unet).save_pretrained(tmp_path / "control")
    parts = base.vae(), base.text_encoder(), base.tokenizer, unet, base.sampler()
    made = LSASTPipeline(*parts, controlnet=str(tmp_path / "control"))
    made.bank.add("monet", p.prompt("lsast"))
    made.set_progress_bar_config(disable=True)
    assert made.controlled
    p.paint(made)


def test_controlnets_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    unet = p.pipeline("lsast", checkpoint).unet
    config = {**ControlNetModel.from_unet(unet).config, "block_out_channels": (16, 64, 64)}
    narrow = ControlNetModel.from_config(config)
    narrow.save_pretrained(tmp_path / "narrow")
    said = r"controlnet: has block_out_channels \[16, 64, 64\], the denoiser \[32, 64, 64\]; take one made for this ch"
    for given in (narrow, tmp_path / "narrow"):
        with quiet(), pytest.raises(ValueError, match=said) as caught:
            LSASTPipeline.from_pretrained(checkpoint, controlnet=given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^controlnet: .*nowhere cannot be read: ") as caught:
        LSASTPipeline.from_pretrained(checkpoint, controlnet=tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"controlnet: Linear is not a ControlNetModel; give a single one$"):
        LSASTPipeline.from_pretrained(checkpoint, controlnet=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            torch.rand(1, 3, 32, 32),
            r"^control_image: 1 of 32 x 32 px, while image is 1 of 64 x 32 px; give one of each",
        ),
        (torch.rand(2, 3, 32, 64), r"^control_image: 2 of 64 x 32 px, while image is 1 of 64 x 32 px"),
        ("edges.png", r"^control_image: str is not a picture"),
    ],
)
def test_control_images_that_do_not_fit_are_refused(checkpoint: Path, given: Any, said: str) -> None:
    made = controlled(checkpoint, "monet")
    with pytest.raises(ValueError, match=said):
        p.paint(made, control_image=given)
    with pytest.raises(ValueError, match=r"^control_image: there is no ControlNet to see it; give from_pretrained a"):
        p.paint(p.pipeline("lsast", checkpoint, "monet"), control_image=shapes())


def test_a_denoiser_with_few_resolutions_cannot_have_the_papers_form(tmp_path: Path) -> None:
    base = Base("tiny")
    config = {**base.unet().config, "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]}
    config["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    with quiet():
        base.save(tmp_path / "two", type(base.unet()).from_config(config), base.vae())
    made = p.pipeline("lsast", tmp_path / "two", "monet")
    made.bank.add("cezanne", p.prompt("lsast", form="released"))
    with pytest.raises(ValueError, match=r"^prompt.form: the paper's form needs 3 resolutions with cross-attention"):
        p.paint(made)
    p.paint(made, "cezanne")
