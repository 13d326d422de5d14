"""Checkpoints as people have them: in half precision, in variants, in a single file, of other kinds."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.diffusion.base import SIZES, Base, quiet
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tests.tasks.style_transfer import pipelines as p
from tests.tasks.style_transfer.diffusion.models import ARTBANK, task_of
from tests.tasks.style_transfer.single_file import save_single_file

CLASSES: dict[str, Any] = {"artbank": ArtBankPipeline, "lsast": LSASTPipeline}
both = pytest.mark.parametrize("method", p.METHODS)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Folders that diffusers itself has saved: half (fp16 under plain names), variant (fp16 files alone), two (fp16
    and bf16)."""
    room = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint).to(torch.float16)
        pipeline.save_pretrained(room / "half")
        pipeline.save_pretrained(room / "variant", variant="fp16")
        pipeline.save_pretrained(room / "two", variant="fp16")
        pipeline.save_pretrained(room / "two", variant="bf16")
    return room


@both
@pytest.mark.parametrize("name", ["half", "variant"])
def test_half_precision_paints_in_fp32_unless_told_otherwise(room: Path, method: str, name: str) -> None:
    made = p.pipeline(method, room / name, "monet")
    assert {each.dtype for each in (made.unet, made.vae, made.text_encoder)} == {torch.float32}
    painted = p.paint(made)
    assert painted.dtype == torch.float32
    # As from the same numbers under plain names in fp32.
    with quiet():
        StableDiffusionPipeline.from_pretrained(room / "half", torch_dtype=torch.float32).save_pretrained(
            room / "whole"
        )
    assert torch.equal(painted, p.paint(p.pipeline(method, room / "whole", "monet")))
    half = CLASSES[method].from_pretrained(room / name, torch_dtype=torch.float16)
    assert {each.dtype for each in (half.unet, half.vae, half.text_encoder)} == {torch.float16}


@pytest.mark.parametrize("name", ["half", "variant"])
def test_a_task_reads_them_in_fp32(room: Path, name: str) -> None:
    made, saved = Base(str(room / name)), Base("tiny")
    for part in ("unet", "text_encoder", "vae"):
        network = getattr(made, part)()
        assert network.dtype == torch.float32
        if part != "vae":
            for key, tensor in getattr(saved, part)().state_dict().items():
                assert torch.equal(network.state_dict()[key], tensor.half().float()), (part, key)


def test_the_variant_is_the_one_asked_for(room: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "both")
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    other = {name: torch.full_like(tensor, 0.5) for name, tensor in weights.items()}
    save_file(other, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    assert not Base(str(folder)).unet().conv_in.weight.eq(0.5).any()
    base = Base(str(folder), variant="non_ema")
    assert base.unet().conv_in.weight.eq(0.5).all()
    base.text_encoder()  # has no such variant, and is read as it is
    _, task = task_of(ARTBANK, tmp_path, "--model.pretrained", str(folder), "--model.variant", "non_ema")
    assert task.base.unet().conv_in.weight.eq(0.5).all()
    assert ArtBankPipeline.from_pretrained(folder, variant="non_ema").unet.conv_in.weight.eq(0.5).all()
    for wanted, said in (
        ("non-ema", r"both has no files of variant 'non-ema', did you mean 'non_ema'\?; it has non_ema$"),
        ("fp16", r"both has no files of variant 'fp16'; it has non_ema$"),
    ):
        with pytest.raises(ValueError, match=rf"^model.pretrained: .*{said}"):
            Base(str(folder), variant=wanted).unet()
        with pytest.raises(ValueError, match=said):
            ArtBankPipeline.from_pretrained(folder, variant=wanted)
    with pytest.raises(ValueError, match=r"its files have no variant in their names; leave it out$"):
        Base(str(checkpoint), variant="fp16").unet()


def test_of_several_variants_the_user_chooses(room: Path) -> None:
    said = r"two/unet has several variants: bf16, fp16; choose one by `variant`$"
    with pytest.raises(ValueError, match=said):
        Base(str(room / "two")).unet()
    with pytest.raises(ValueError, match=said):
        ArtBankPipeline.from_pretrained(room / "two")
    assert Base(str(room / "two"), variant="bf16").unet().dtype == torch.float32
    ArtBankPipeline.from_pretrained(room / "two", variant="fp16")


@pytest.mark.parametrize(("unet", "others"), [("half", "variant"), ("variant", "half")])
def test_networks_of_several_variants_in_one_checkpoint(room: Path, tmp_path: Path, unet: str, others: str) -> None:
    """All were looked for in the UNet's variant, and a text encoder that has only another was not found."""
    folder = shutil.copytree(room / others, tmp_path / "mixed")
    shutil.rmtree(folder / "unet")
    shutil.copytree(room / unet / "unet", folder / "unet")
    for dtype in (torch.float32, torch.float16):
        made, plain = (ArtBankPipeline.from_pretrained(each, torch_dtype=dtype) for each in (folder, room / "half"))
        for part in ("unet", "text_encoder", "vae"):
            network, wanted = getattr(made, part), getattr(plain, part)
            assert network.dtype == dtype, part
            assert not network.training
            assert all(map(torch.equal, network.state_dict().values(), wanted.state_dict().values())), part


def test_a_controlnet_in_a_variant(room: Path, tmp_path: Path) -> None:
    ControlNetModel.from_unet(Base("tiny").unet()).half().save_pretrained(tmp_path / "control", variant="fp16")
    made = p.pipeline("lsast", room / "variant", "monet", controlnet=tmp_path / "control")
    assert made.controlled
    assert made.controlnet.dtype == torch.float32
    p.paint(made)


@pytest.fixture(scope="module")
def single(room: Path) -> tuple[Path, Path]:
    """A folder, and the file with the same networks."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    base = Base("tiny")
    with quiet():
        base.save(room / "kl", base.unet(), vae)
        save_single_file(room / "kl", room / "v1.safetensors")
    return room / "kl", room / "v1.safetensors"


@both
def test_a_single_file_paints_with_a_config_at_hand(single: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    folder, file = single
    wanted = p.pipeline(method, folder, "monet")
    wanted.bank.save(tmp_path / "bank.safetensors")
    with quiet():
        made = CLASSES[method].from_single_file(file, tmp_path / "bank.safetensors", config=str(folder))
    made.set_progress_bar_config(disable=True)
    assert made.scheduler.config == wanted.scheduler.config
    torch.testing.assert_close(p.paint(made), p.paint(wanted), rtol=1e-3, atol=1e-3)


def test_a_single_file_is_refused_with_the_command_that_converts_it(single: tuple[Path, Path], tmp_path: Path) -> None:
    _, file = single
    said = r"v1.safetensors is a single file; convert it .*: python -c 'from diffusers import .*v1.safetensors\"\)"
    for load in (Base(str(file)).unet, lambda: ArtBankPipeline.from_pretrained(file)):
        with pytest.raises(ValueError, match=said) as caught:
            load()
        assert "\n" not in str(caught.value)
    old = tmp_path / "old.ckpt"
    torch.save({"state_dict": {}}, old)
    with pytest.raises(ValueError, match=r"old.ckpt is a single file; convert it"):
        Base(str(old)).unet()


@pytest.mark.parametrize("name", ["it's", "$HOME", 'a"b', "with space", "é", "back\\slash"])
def test_the_command_that_converts_is_for_a_shell(tmp_path: Path, name: str) -> None:
    """A quote or a dollar sign in a path made it another command."""
    file = tmp_path / f"{name}.ckpt"
    torch.save({}, file)
    with pytest.raises(ValueError, match="is a single file") as caught:
        Base(str(file)).unet()
    (code,) = shlex.split(str(caught.value).split("python -c ")[1])
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert sorted(literals) == sorted([str(file), str(file.with_suffix(""))])


def saved(folder: Path, unet: Any, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("unet"))
    unet.save_pretrained(folder / "unet")
    return folder


def sdxl(room: Path, checkpoint: Path) -> Path:
    config = {**SIZES["tiny"]["unet"], "addition_embed_type": "text_time"}
    config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112}
    return saved(room / "xl", UNet2DConditionModel(**config), checkpoint)


def inpainting(room: Path, checkpoint: Path) -> Path:
    return saved(room / "fill", UNet2DConditionModel(**{**SIZES["tiny"]["unet"], "in_channels": 9}), checkpoint)


def file_of(name: str, *shape: int) -> Callable[[Path, Path], Path]:
    def make(room: Path, _: Path) -> Path:
        save_file({name: torch.zeros(*shape)}, room / "it.safetensors")
        return room / "it.safetensors"

    return make


def prompts(room: Path, checkpoint: Path) -> Path:
    p.pipeline("artbank", checkpoint, "monet").bank.save(room / "bank.safetensors")
    return room / "bank.safetensors"


def run_folder(room: Path, _: Path) -> Path:
    (room / "run/checkpoints").mkdir(parents=True)
    (room / "run/config.yaml").touch()
    return room / "run"


def damaged(room: Path, _: Path) -> Path:
    (room / "it.safetensors").write_bytes(b"no weights")
    return room / "it.safetensors"


def text(room: Path, _: Path) -> Path:
    (room / "notes.txt").touch()
    return room / "notes.txt"


def folder_of_a_file(room: Path, checkpoint: Path) -> Path:
    (room / "sd").mkdir()
    return file_of("model.diffusion_model.input_blocks.0.0.weight", 320, 4, 3, 3)(room / "sd", checkpoint).parent


SDXL_NAME = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (sdxl, r"xl is an SDXL checkpoint: its UNet has addition_embed_type 'text_time', not None; give Stable"),
        (inpainting, r"fill is an inpainting checkpoint: its UNet has in_channels 9, not 4; give Stable"),
        (file_of(SDXL_NAME, 1280), r"it.safetensors is an SDXL checkpoint; give Stable"),
        (
            file_of("model.diffusion_model.input_blocks.0.0.weight", 320, 9, 3, 3),
            r"it.safetensors is an inpainting checkpoint; give Stable",
        ),
        (file_of("head.weight", 2), r"it.safetensors is no Stable Diffusion 1.x or 2.x; give Stable"),
        (
            file_of("double_blocks.0.img_attn.norm.key_norm.scale", 2),
            r"it.safetensors is no Stable Diffusion 1.x or 2.x but flux-schnell; give Stable",
        ),
        (file_of("lora_unet_down_blocks_0.lora_down.weight", 2), r"it.safetensors is a LoRA, which changes a check"),
        (lambda room, checkpoint: checkpoint / "unet", r"/unet is one part of a checkpoint; give the folder above it"),
        (
            lambda room, checkpoint: checkpoint / "unet/diffusion_pytorch_model.safetensors",
            r"safetensors is one part of a checkpoint; give the folder that has model_index.json",
        ),
        (prompts, r"bank.safetensors holds artists' prompts, not a checkpoint; prompt.bank takes them"),
        (run_folder, r"run is a run; .* python tools/export.py --run .*run --out FOLDER$"),
        (damaged, r"it.safetensors cannot be read: "),
        (text, r"notes.txt is not a checkpoint; give Stable"),
        (folder_of_a_file, r"sd is not in diffusers' layout: it has no unet/config.json; .* is a single file; convert"),
        (lambda room, _: room, r" is not a checkpoint: it has no unet/config.json; give Stable"),
        (lambda room, _: room / "not/there.safetensors", r"there is no folder .*not/there.safetensors; give Stable"),
    ],
)
def test_what_is_no_stable_diffusion_is_called_by_its_name(
    checkpoint: Path, tmp_path: Path, make: Callable[[Path, Path], Path], said: str
) -> None:
    place = make(tmp_path, checkpoint)
    for load in (Base(str(place)).unet, lambda: ArtBankPipeline.from_pretrained(place)):
        with pytest.raises(ValueError, match=said) as caught:
            load()
        assert "\n" not in str(caught.value)
    if place.is_file() and place.suffix == ".safetensors":
        with pytest.raises(ValueError, match=said):
            ArtBankPipeline.from_single_file(place)


def test_a_lora_is_fused_by_the_command_that_is_said(checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    unet = Base("tiny").unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    matrices = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, matrices, weight_name="lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors is a LoRA") as caught:
        Base(str(tmp_path / "lora.safetensors")).unet()
    (code,) = shlex.split(str(caught.value).split("python -c ")[1])
    exec(code.replace("CHECKPOINT", str(checkpoint)), {})
    fused, plain = Base(str(tmp_path / "lora")).unet().state_dict(), Base(str(checkpoint)).unet().state_dict()
    changed = {name for name in plain if not torch.equal(fused[name], plain[name])}
    assert fused.keys() == plain.keys()
    assert changed == {name for name in plain if name.endswith("to_q.weight")}


@both
def test_a_text_encoder_of_another_width(checkpoint: Path, tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "sd")
    config = {**SIZES["tiny"]["text_encoder"], "hidden_size": 32}
    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    said = r"sd has a text encoder of width 32, and a UNet that reads width 64; take both from one checkpoint$"
    base = Base(str(folder))
    for load in (base.text_encoder, base.text_shape, lambda: base.text_encoder(weights=False)):
        with pytest.raises(ValueError, match=said):
            load()
    with pytest.raises(ValueError, match=said):
        CLASSES[method].from_pretrained(folder)


@pytest.mark.parametrize("value", [None, [None, None]])
def test_a_checkpoint_whose_safety_checker_is_null(checkpoint: Path, tmp_path: Path, value: Any) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "safety_checker": value}))
    if value:
        p.paint(p.pipeline("artbank", folder, "monet"))
    else:
        with pytest.raises(ValueError, match=r"sd/model_index.json: safety_checker is null; write \[null, null\]"):
            ArtBankPipeline.from_pretrained(folder)
