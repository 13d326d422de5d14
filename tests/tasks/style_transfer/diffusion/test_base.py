"""Checkpoints: made on the spot, from a folder, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel

from tasks.style_transfer.diffusion import base
from tasks.style_transfer.diffusion.base import Base, to_latents
from tasks.style_transfer.diffusion.text import encode, tokens
from tests.shared import SHARED, needs_shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, path = Base("tiny"), tmp_path_factory.mktemp("base") / "tiny"
    made.save(path, made.unet(), made.vae())
    return path


def test_a_made_one_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    one = Base("tiny").unet().state_dict()
    torch.manual_seed(6)
    for name, tensor in Base("tiny").unet().state_dict().items():
        assert torch.equal(tensor, one[name]), name
    assert not torch.equal(Base("tiny", seed=1).unet().conv_in.weight, one["conv_in.weight"])


def test_a_folder_gives_what_was_saved(folder: Path) -> None:
    made, read = Base("tiny"), Base(str(folder))
    for part in ("unet", "text_encoder", "vae"):
        again = getattr(read, part)().state_dict()
        for name, tensor in getattr(made, part)().state_dict().items():
            assert torch.equal(tensor, again[name]), (part, name)
    text = ["a painting by van gogh *"]
    assert torch.equal(tokens(read.tokenizer, text), tokens(made.tokenizer, text))
    assert torch.equal(read.scheduler.alphas_cumprod, made.scheduler.alphas_cumprod)
    assert torch.equal(read.sampler().alphas_cumprod, made.scheduler.alphas_cumprod)
    assert read.text_shape() == made.text_shape() == (32, 64)


def test_diffusers_own_pipeline_reads_the_folder(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a painting", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)


def test_without_weights_only_shapes_are_right(folder: Path) -> None:
    for name in ("tiny", str(folder)):
        shapes = {key: tensor.shape for key, tensor in Base(name).unet(weights=False).state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in Base("tiny").unet().state_dict().items()}
        assert Base(name).unet(weights=False).conv_in.weight.eq(0.01).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "text", "shape"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 123_060_480, (77, 768)),
        ("stabilityai/stable-diffusion-2-1-base", 865_910_724, 340_387_840, (77, 1024)),
    ],
)
def test_sizes_of_the_hubs_checkpoints_are_known_without_it(
    name: str, parameters: int, text: int, shape: tuple[int, int]
) -> None:
    """Numbers of parameters as published with the checkpoints."""
    checkpoint = Base(name)
    assert sum(parameter.numel() for parameter in checkpoint.unet(weights=False).parameters()) == parameters
    assert sum(p.numel() for p in checkpoint.text_encoder(weights=False).parameters()) == text
    assert checkpoint.text_shape() == shape
    assert checkpoint.tokenizer_like(weights=False).model_max_length == 77


def test_texts_of_an_untrained_model_are_told_apart() -> None:
    made = Base("tiny")
    one, other = encode(made.text_encoder(), tokens(made.tokenizer, ["a dark painting", "a bright photograph"]))
    assert (one - other).std() > 0.2 * one.std()


@pytest.mark.parametrize("made", [AutoencoderTiny(), AutoencoderKL(block_out_channels=(32,) * 4, norm_num_groups=8)])
def test_latents_have_a_deviation_where_the_autoencoder_gives_one(made: torch.nn.Module) -> None:
    if isinstance(made, AutoencoderKL):
        made = AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
    with torch.no_grad():
        mean, deviation = to_latents(made, torch.rand(1, 3, 32, 48))
    assert mean.shape == (1, 4, 4, 6)
    assert (deviation is None) == isinstance(made, AutoencoderTiny)


@needs_shared("weights")
def test_taesd_gives_pictures_back() -> None:
    from tasks.style_transfer.diffusion.autoencoder import tiny_autoencoder
    from tasks.style_transfer.diffusion.data import read_resized

    vae = tiny_autoencoder(str(SHARED / "weights/taesd_fp16.safetensors"), list, Path("unused"), 0)
    picture = read_resized(next((SHARED / "data/style/vangogh").iterdir()), 128)[None]
    with torch.no_grad():
        again = vae.decode(to_latents(vae, picture)[0]).sample / 2 + 0.5
    assert -10 * (again - picture).square().mean().log10() > 18  # dB, as shared/data/README.md says


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^model.pretrained: there is no folder runs/nothing; give Stable") as error:
        Base("runs/nothing").unet()
    assert "\n" not in str(error.value)


def test_a_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(
        ValueError, match=r"^model.pretrained: nobody/nothing cannot be read: it is no folder here"
    ) as error:
        Base("nobody/nothing").unet()
    assert "\n" not in str(error.value)


def edited(folder: Path, room: Path, **changes: object) -> str:
    """A copy of the folder whose UNet's config says something else."""
    (room / "unet").mkdir(parents=True)
    config = json.loads((folder / "unet/config.json").read_text())
    (room / "unet/config.json").write_text(json.dumps({**config, **changes}))
    return str(room)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"addition_embed_type": "text_time"},
            "an SDXL checkpoint: its UNet has addition_embed_type 'text_time', not None",
        ),
        ({"in_channels": 9}, "an inpainting checkpoint: its UNet has in_channels 9, not 4"),
        (
            {"class_embed_type": "timestep"},
            "of another architecture: its UNet has class_embed_type 'timestep', not None",
        ),
        (
            {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3},
            "of another architecture: its UNet has a SimpleCrossAttnDownBlock2D; known: CrossAttnDownBlock2D, ",
        ),
    ],
)
def test_unets_of_other_architectures(folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    name = edited(folder, tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=rf"^model.pretrained: {name} is {message}.*; give Stable Diffusion "):
        Base(name).unet()


def test_a_checkpoint_with_a_transformer(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ValueError, match=r"is of another architecture: it has transformer/ and no unet/; give "):
        Base(str(tmp_path)).unet()


def test_a_damaged_part_is_named(folder: Path, tmp_path: Path) -> None:
    name = edited(folder, tmp_path / "other")
    with pytest.raises(ValueError, match=rf"^model.pretrained: unet of {name} cannot be read: ") as error:
        Base(name).unet()
    assert "\n" not in str(error.value)


def test_nothing_is_said_while_loading(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read = Base(str(folder))
    read.unet(), read.text_encoder(), read.vae(), read.tokenizer
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_what_is_made_on_the_spot_restores_the_way_networks_are_initialised() -> None:
    before = torch.nn.init.kaiming_uniform_
    base._for_shapes(lambda: UNet2DConditionModel.from_config(Base("tiny").unet().config))
    assert torch.nn.init.kaiming_uniform_ is before
