"""A checkpoint in a single file, under the names of Stable Diffusion's original code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def save_single_file(folder: Path, file: Path) -> None:
    """Write the networks of a folder, whose autoencoder is an AutoencoderKL, to one file."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    found = {f"model.diffusion_model.{_unet(pipeline.unet, k)}": v for k, v in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        new = _vae(pipeline.vae, name)
        # Attention was made of convolutions.
        found[f"first_stage_model.{new}"] = tensor[:, :, None, None] if "attn_1" in new and tensor.ndim == 2 else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


def _unet(unet: Any, name: str) -> str:
    step = unet.config.layers_per_block + 1  # layers of a level on the way down, its change of resolution included

    def down(m: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(m[1]) * step + int(m[3])}.{int(m[2] == 'attentions')}."

    def up(m: re.Match[str]) -> str:
        return f"output_blocks.{int(m[1]) * step + int(m[3])}.{int(m[2] == 'attentions')}."

    rules: list[tuple[str, Any]] = [
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", down),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * step}.0.op"),
        (r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", up),
        (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{int(m[1]) * step + step - 1}.2"),
        (r"^mid_block\.(resnets|attentions)\.(\d)", lambda m: f"middle_block.{1 if m[1][0] == 'a' else 2 * int(m[2])}"),
    ]
    if ".resnets." in name:
        rules += [(rf"\.{old}\.", f".{new}.") for old, new in RESNET.items()]
    return _renamed(name, rules)


def _vae(vae: Any, name: str) -> str:
    last = len(vae.config.block_out_channels) - 1
    rules: list[tuple[str, Any]] = [
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_([qkv])", r"\1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ]
    return _renamed(name, rules)


def _renamed(name: str, rules: list[tuple[str, Any]]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name
