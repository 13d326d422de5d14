"""What both pipelines do alike: banks, arguments, saving and loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler
from PIL import Image
from torch import nn

from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tests.tasks.style_transfer import pipelines as p

both = pytest.mark.parametrize("method", p.METHODS)
CLASSES = {"artbank": ArtBankPipeline, "lsast": LSASTPipeline}


def copied(checkpoint: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of the checkpoint with some values of a JSON file changed."""
    shutil.copytree(checkpoint, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


@both
def test_the_same_seed_paints_the_same_picture(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet", "cezanne")
    first = p.paint(made, seed=1)
    assert torch.equal(first, p.paint(made, seed=1))
    for other in (p.paint(made, seed=2), p.paint(made, "cezanne", seed=1), p.paint(made, seed=1, inversion="none")):
        assert not torch.allclose(first, other, atol=1e-3)


@both
def test_kinds_of_output(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    pictures = p.paint(made, output_type="pil", image=p.content(2))
    assert [picture.size for picture in pictures] == [(64, 32)] * 2
    assert isinstance(pictures[0], Image.Image)
    assert p.paint(made, output_type="np").shape == (1, 32, 64, 3)
    images, flagged = made(p.content(), "monet", num_inference_steps=2, return_dict=False, output_type="pt")
    assert images.shape == (1, 3, 32, 64)
    assert flagged is None


@both
def test_pictures_of_a_batch_do_not_meet(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    image = p.content(2)
    generators = [torch.Generator().manual_seed(4), torch.Generator().manual_seed(0)]
    two = made(image, "monet", generator=generators, num_inference_steps=p.STEPS, output_type="latent").images
    torch.testing.assert_close(two[1:], p.paint(made, image=image[1:]), rtol=1e-4, atol=1e-4)


@both
@torch.no_grad()
def test_guidance_1_is_the_prompt_alone(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    with p.calls(made.unet) as seen:
        found = p.paint(made, guidance_scale=1, negative_prompt="red")
    assert all(len(call["x"]) == 1 for call in seen), "nothing is predicted without the prompt"
    x = seen[1]["x"]
    for call in seen[1:]:
        predicted = made.unet(x, call["t"], encoder_hidden_states=call["encoder_hidden_states"]).sample
        x = made.scheduler.step(predicted, call["t"], x).prev_sample
    assert torch.equal(x, found)
    torch.testing.assert_close(found, p.paint(made, guidance_scale=1 + 1e-6), rtol=1e-3, atol=1e-3)


@both
def test_a_negative_prompt_is_what_guidance_goes_away_from(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    with p.calls(made.unet) as seen:
        red = p.paint(made, negative_prompt="red", guidance_scale=3)
    layers = made.bank["monet"]().shape[1]
    torch.testing.assert_close(seen[1]["encoder_hidden_states"][:1], p.no_text(made, "red").repeat(1, layers, 1))
    assert not torch.allclose(red, p.paint(made, guidance_scale=3), atol=1e-3)


@both
@torch.no_grad()
@pytest.mark.parametrize("strength", [0, 0.124])
def test_without_a_step_it_is_the_reconstruction(checkpoint: Path, method: str, strength: float) -> None:
    made, image = p.pipeline(method, checkpoint, "monet"), p.content()
    latents = made.vae.encode(image * 2 - 1).latents
    pictures = (made.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    with p.calls(made.unet) as seen:
        assert torch.equal(p.paint(made, strength=strength), latents)
        assert torch.equal(p.paint(made, strength=strength, output_type="pt"), pictures)
        assert made(image, "monet", strength=strength, num_inference_steps=8, return_dict=False)[1] is None
    assert not seen
    p.paint(made, strength=0.125)  # a whole step


@torch.no_grad()
def test_a_reconstruction_has_no_chance_in_it(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    made.vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    expected = made.vae.encode(p.content() * 2 - 1).latent_dist.mean * made.vae.config.scaling_factor
    assert torch.equal(p.paint(made, strength=0), expected)


@both
def test_strength_says_how_many_steps_are_done(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    for strength, steps in ((1.0, 8), (0.5, 4), (0.7, 5)):
        with p.calls(made.unet) as seen:
            p.paint(made, strength=strength, inversion="none")
        assert len(seen) == steps


@both
def test_a_users_callback_is_called_at_each_step(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    steps: list[tuple[int, list[str]]] = []

    def note(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, sorted(given)))
        return given

    plain = p.paint(made)
    assert torch.equal(plain, p.paint(made, callback_on_step_end=note))
    assert steps == [(n, ["latents"]) for n in range(5)]

    def zero(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(given["latents"])}

    assert not p.paint(made, callback_on_step_end=zero).any(), "what it returns counts"


@both
def test_artists_come_and_go_and_the_others_stay(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    alone = p.paint(made)
    made.bank.add("cezanne", p.prompt(method, 1))
    assert made.artists == ["monet", "cezanne"]
    assert torch.equal(p.paint(made), alone)
    other = p.paint(made, "cezanne")
    assert torch.equal(p.paint(made), alone), "and back"
    monet = made.bank.remove("monet")
    assert torch.equal(p.paint(made, "cezanne"), other)
    with pytest.raises(ValueError, match=r"^artist: 'monet' is none of cezanne$"):
        p.paint(made)
    with pytest.raises(ValueError, match=r"^artist: \['cezanne'\] is not a name; a call paints in one artist's style$"):
        p.paint(made, ["cezanne"])
    assert repr(made.bank) == f"PromptBank({made.method!r}, artists=['cezanne'])"
    made.bank.add("monet", monet)
    assert torch.equal(p.paint(made), alone)


@both
def test_saved_and_loaded_it_paints_the_same_to_the_bit(checkpoint: Path, tmp_path: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet", "van gogh")
    made.bank["monet"].eval()
    made.save_pretrained(tmp_path / "saved")
    again = p.pipeline(method, tmp_path / "saved")
    assert again.artists == ["monet", "van gogh"]
    for artist in made.artists:
        assert torch.equal(p.paint(made, artist), p.paint(again, artist))
    assert made.bank["monet"].training is False, "painting leaves a prompt as it was"
    assert again.bank["monet"].training is True


@both
def test_an_empty_bank_is_saved_too(checkpoint: Path, tmp_path: Path, method: str) -> None:
    p.pipeline(method, checkpoint).save_pretrained(tmp_path / "saved")
    made = p.pipeline(method, tmp_path / "saved")
    assert made.artists == []
    with pytest.raises(ValueError, match=r"^artist: 'monet' is unknown; there are none yet$"):
        p.paint(made)


@both
def test_a_bank_given_goes_before_the_folders_own(checkpoint: Path, tmp_path: Path, method: str) -> None:
    p.pipeline(method, checkpoint, "monet").save_pretrained(tmp_path / "saved")
    p.pipeline(method, checkpoint, "cezanne", "monet").bank.save(tmp_path / "bank.safetensors")
    made = CLASSES[method].from_pretrained(tmp_path / "saved", tmp_path / "bank.safetensors")
    assert made.artists == ["cezanne", "monet"]
    made.bank.remove("monet")
    made.load_prompts(tmp_path / "saved/prompts.safetensors")
    assert made.artists == ["cezanne", "monet"], "what is loaded is added"
    assert torch.equal(p.paint(made), p.paint(p.pipeline(method, tmp_path / "saved")))


@both
def test_checkpoints_with_what_is_not_wanted(checkpoint: Path, tmp_path: Path, method: str) -> None:
    """As Stable Diffusion 1.5 lists them: a safety checker, and a scheduler that is not DDIM."""
    folder = copied(
        checkpoint,
        tmp_path / "sd",
        "model_index.json",
        scheduler=["diffusers", "PNDMScheduler"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    PNDMScheduler(
        steps_offset=1,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
    ).save_pretrained(folder / "scheduler")
    made = p.pipeline(method, folder, "monet")
    assert isinstance(made.scheduler, DDIMScheduler)
    config = made.scheduler.config
    assert (config.beta_end, config.prediction_type) == (0.012, "v_prediction")
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert made.safety_checker is None
    p.paint(made)
    given = PNDMScheduler(steps_offset=1)
    assert CLASSES[method].from_pretrained(folder, scheduler=given).scheduler is given


@both
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: shutil.rmtree(f), r"there is no folder .*sd"),
        (
            lambda f: (f / "unet").rename(f / "transformer"),
            r"sd is of another architecture: it has transformer/ and no unet/",
        ),
        (lambda f: (f / "vae/config.json").unlink(), r"sd: cannot be read: .*vae"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"damaged"),
            r"sd: cannot be read: ",
        ),
    ],
)
def test_checkpoints_that_are_none(
    checkpoint: Path, tmp_path: Path, method: str, change: Callable[[Path], Any], said: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "sd")
    change(tmp_path / "sd")
    with pytest.raises(ValueError, match=said) as caught:
        CLASSES[method].from_pretrained(tmp_path / "sd")
    assert "\n" not in str(caught.value)


@both
def test_other_architectures_are_refused_before_they_are_read(checkpoint: Path, tmp_path: Path, method: str) -> None:
    folder = copied(checkpoint, tmp_path / "xl", "unet/config.json", addition_embed_type="text_time")
    shutil.rmtree(folder / "vae")
    with pytest.raises(
        ValueError, match=r"xl is an SDXL checkpoint: its UNet has addition_embed_type 'text_time', not None"
    ) as caught:
        CLASSES[method].from_pretrained(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^'tiny' names networks that are made for training; give a folder"):
        CLASSES[method].from_pretrained("tiny")


@both
def test_prompts_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path, method: str) -> None:
    other = {"artbank": "lsast", "lsast": "artbank"}[method]
    p.pipeline(other, checkpoint, "monet").bank.save(tmp_path / "other.safetensors")
    p.pipeline(method, checkpoint, "monet", width=32).bank.save(tmp_path / "narrow.safetensors")
    made = p.pipeline(method, checkpoint, "cezanne")
    for name, said in (
        ("other", rf"other.safetensors: has prompts of {other}, not of {method}"),
        ("narrow", r"narrow.safetensors: the prompt of 'monet' has width 32, .* this checkpoint has width 64"),
        ("missing", r"missing.safetensors: there is no such file of prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            made.load_prompts(tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=said):
            CLASSES[method].from_pretrained(checkpoint, tmp_path / f"{name}.safetensors")
    assert made.artists == ["cezanne"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; give a folder$"):
        made.save_pretrained(tmp_path / "file")


@both
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"artist": "monte"}, r"^artist: 'monte' is none of cezanne, monet; did you mean 'monet'\?$"),
        ({"strength": 1.01}, r"^strength: 1.01 is not from 0 to 1$"),
        ({"strength": -0.1}, r"^strength: -0.1 is not from 0 to 1$"),
        ({"strength": float("nan")}, r"^strength: nan is not from 0 to 1$"),
        ({"guidance_scale": 0.5}, r"^guidance_scale: 0.5 is too small; the least is 1"),
        ({"num_inference_steps": 0}, r"^num_inference_steps: 0 is too small; the least is 1$"),
        ({"num_inference_steps": 1000}, r"^num_inference_steps: 1000 is too large; the most is 999$"),
        ({"inversion": "ddim"}, r"^inversion: 'ddim' is none of stochastic, none$"),
        (
            {"image": np.zeros((44, 64, 3), np.uint8)},
            r"^image: 64 x 44 px; sides must be multiples of 8; resize or pad it, or use tools/stylize.py, which",
        ),
        ({"image": "hill.png"}, r"^image: str is not a picture"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(
    checkpoint: Path, method: str, given: dict[str, Any], said: str
) -> None:
    made = p.pipeline(method, checkpoint, "monet", "cezanne")
    with p.calls(made.unet) as denoised, p.calls(made.text_encoder) as read, pytest.raises(ValueError, match=said) as e:
        p.paint(made, **given)
    assert not denoised
    assert not read
    assert "\n" not in str(e.value)


def test_sides_are_those_of_the_networks(checkpoint: Path) -> None:
    made = p.pipeline("artbank", checkpoint, "monet")
    assert made.multiple == 8
    assert p.paint(made, image=p.content(1, 32, 96)).shape == (1, 4, 4, 12)


@both
def test_after_an_error_in_the_middle_it_paints_as_before(checkpoint: Path, method: str) -> None:
    made = p.pipeline(method, checkpoint, "monet")
    before = p.paint(made)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        p.paint(made, callback_on_step_end=fail)
    assert made.inversion == "none"
    assert torch.equal(p.paint(made), before)


def with_control(method: str, checkpoint: Path) -> Any:
    made = p.pipeline(method, checkpoint)
    control = p.controlnet(made.unet) if method == "lsast" else None
    return p.pipeline(method, checkpoint, "monet", controlnet=control)


@both
def test_every_network_is_offloaded_and_called_through_its_hook(
    checkpoint: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the CPU, since there may be no GPU: the hooks are the same."""
    made, called = with_control(method, checkpoint), set[int]()
    before, pre_forward = p.paint(made, output_type="pt"), CpuOffload.pre_forward

    def note(hook: CpuOffload, module: nn.Module, *given: Any, **named: Any) -> Any:
        called.add(id(module))
        return pre_forward(hook, module, *given, **named)

    monkeypatch.setattr(CpuOffload, "pre_forward", note)
    made.enable_model_cpu_offload(device="cpu")
    assert torch.equal(p.paint(made, output_type="pt"), before)
    networks = {id(each): name for name, each in made.components.items() if isinstance(each, nn.Module)}
    assert len(networks) == (4 if method == "lsast" else 3)
    assert called == set(networks)
    # What alternates at every step must not push each other out: diffusers leaves a ControlNet out of the sequence.
    assert "controlnet" not in made.model_cpu_offload_seq


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_it_paints_the_same_on_a_gpu(checkpoint: Path, method: str, how: str) -> None:
    whole, parts = with_control(method, checkpoint).to("cuda"), with_control(method, checkpoint)
    getattr(parts, how)()
    torch.testing.assert_close(p.paint(whole).cpu(), p.paint(parts).cpu(), rtol=1e-3, atol=1e-3)
    assert {each.device.type for each in (parts.unet, parts.text_encoder)} <= {"cpu", "meta"}, "and gives the GPU free"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_in_half_precision_on_a_gpu(checkpoint: Path, method: str) -> None:
    made = with_control(method, checkpoint).to("cuda")
    exact = p.paint(made)
    half = p.paint(made.to(torch.float16))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


@both
def test_attention_in_slices_paints_the_same(checkpoint: Path, method: str) -> None:
    made = with_control(method, checkpoint)
    before = p.paint(made)
    made.enable_attention_slicing(1)
    torch.testing.assert_close(p.paint(made), before, rtol=1e-4, atol=1e-4)
    without = p.pipeline(method, checkpoint, "monet")
    without.enable_attention_slicing()
    p.paint(without)
