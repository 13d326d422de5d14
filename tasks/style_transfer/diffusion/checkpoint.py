"""What lies where a Stable Diffusion checkpoint is expected: the variant of its files, or what it is instead."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open

from engine.utilities.text import did_you_mean, one_line

SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that hold a whole checkpoint or a part of one."""
PARTS = ("unet", "text_encoder", "vae")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)
_TAKEN = (
    "give Stable Diffusion 1.x or 2.x: a folder in diffusers' layout or a checkpoint's name on the hub; "
    "tasks/style_transfer/denoiser/configs/denoiser_tiny.yaml trains a small one"
)
# What a UNet's config says of checkpoints that are made for something else.
_KINDS: dict[tuple[str, Any], str] = {
    ("addition_embed_type", "text_time"): "an SDXL checkpoint",
    ("class_embed_type", "projection"): "an unCLIP checkpoint",
    ("in_channels", 9): "an inpainting checkpoint",
    ("in_channels", 8): "an InstructPix2Pix checkpoint",
    ("in_channels", 7): "an upscaler",
    ("in_channels", 5): "a depth-to-image checkpoint",
}
# What is in diffusers' names of single files; its v1 also stands for whatever it does not know.
_SINGLE_KINDS = {"xl": "an SDXL checkpoint", "inpainting": "an inpainting checkpoint", "upscale": "an upscaler"}


def check_folder(key: str, name: str) -> None:
    """Check that ``name`` is a folder with a UNet, or may be a checkpoint's name on the hub.

    Raises:
        ValueError: it is neither; the message begins with ``key``, says what it is instead, and how to convert it.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{key}: {_file(path)}")
    if not path.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "runs/")) or path.suffix in SINGLE:
            raise ValueError(f"{key}: there is no folder {name}; {_TAKEN}")
    elif not (path / "unet/config.json").is_file():
        raise ValueError(f"{key}: {_folder(path)}")


def check_index(folder: Path) -> None:
    """Check that ``model_index.json`` of a folder does not have null where diffusers writes [null, null].

    Raises:
        ValueError: it has, or it is damaged.
    """
    index = folder / "model_index.json"
    if index.is_file():
        try:
            parts = json.loads(index.read_text()).items()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{index}: is not JSON with the names of parts: {one_line(error, 100)}") from error
        # Options of the pipeline may be null; they begin with an underscore, but for this one.
        own = [name for name, value in parts if value is None and not name.startswith("_")]
        nulls = [name for name in own if name != "requires_safety_checker"]
        if nulls:
            raise ValueError(f"{index}: {nulls[0]} is null; write [null, null], as diffusers does for what is left out")


def check_unet(config: Mapping[str, Any], key: str, name: str) -> None:
    """Check by its config that a UNet is that of Stable Diffusion 1.x or 2.x, or a smaller one of the same kind.

    Raises:
        ValueError: the message names the kind of checkpoint, as far as it is known, and the first key that differs.
    """
    plain = (
        *("center_input_sample", "class_embed_type", "addition_embed_type", "num_class_embeds", "encoder_hid_dim_type"),
        *("encoder_hid_dim", "time_cond_proj_dim", "dual_cross_attention", "class_embeddings_concat"),
        *("cross_attention_norm", "time_embedding_act_fn"),
    )
    wanted: dict[str, tuple[Any, ...]] = dict.fromkeys(plain, (None, False))
    wanted |= {"in_channels": (4,), "out_channels": (4,), "mid_block_type": ("UNetMidBlock2DCrossAttn",)}
    for field, values in wanted.items():
        if field in config and config[field] not in values:
            kind = _KINDS.get((field, config[field]), "of another architecture")
            said = f"its UNet has {field} {config[field]!r}, not {values[0]!r}"
            raise ValueError(f"{key}: {name} is {kind}: {said}; {_TAKEN}")
    kinds = {"down": ("CrossAttnDownBlock2D", "DownBlock2D"), "up": ("CrossAttnUpBlock2D", "UpBlock2D")}
    for way, known in kinds.items():
        for found in config.get(f"{way}_block_types") or ():
            if found not in known:
                said = f"its UNet has a {found}; known: {', '.join(known)}"
                raise ValueError(f"{key}: {name} is of another architecture: {said}; {_TAKEN}")


def check_width(unet: Mapping[str, Any], width: int, key: str, name: str) -> None:
    """Check that the text encoder is as wide as the UNet's cross-attention reads.

    Raises:
        ValueError: it is not.
    """
    wanted = unet.get("cross_attention_dim", 1280)  # diffusers' default
    if any(width != each for each in (wanted if isinstance(wanted, list | tuple) else [wanted])):
        raise ValueError(
            f"{key}: {name} has a text encoder of width {width}, and a UNet that reads width {wanted}; take both from "
            "one checkpoint"
        )


def check_tokenizer_files(key: str, name: str) -> None:
    """Check that a folder has a tokenizer; transformers would make an empty one without a word.

    Raises:
        ValueError: it has none.
    """
    folder = Path(name, "tokenizer")
    if Path(name).is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"{key}: {name} has no tokenizer/ with tokenizer.json, or vocab.json and merges.txt; copy that of the "
            "checkpoint that it was made from"
        )


def check_tokenizer(tokenizer: Any, text: Mapping[str, Any], key: str, name: str) -> None:
    """Check that a text encoder, of the config ``text``, takes whatever the tokenizer gives it.

    Raises:
        ValueError: texts may have more tokens, or the vocabulary may be larger, than the text encoder was made for.
    """
    length, longest = tokenizer.model_max_length, text["max_position_embeddings"]
    if length > longest:
        raise ValueError(
            f"{key}: the tokenizer of {name} makes texts of {length:.3g} tokens, its text encoder reads {longest}; set "
            "model_max_length in tokenizer/tokenizer_config.json"
        )
    if len(tokenizer) > text["vocab_size"]:
        raise ValueError(
            f"{key}: the tokenizer of {name} has {len(tokenizer)} tokens, its text encoder {text['vocab_size']}; take "
            "both from one checkpoint"
        )


def variant_in(key: str, folder: Path, wanted: str | None = None) -> str | None:
    """The variant of the files of a network that diffusers is to read; None if their names have none.

    Args:
        wanted: the variant that is read if the network has it; a network without it is read in its only form.

    Raises:
        ValueError: there are several variants, of which the user must choose one.
    """
    found = _variants(folder)
    if wanted in found or not found:  # where nothing is found, diffusers says which file is missing
        return wanted if found else None
    if None in found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"{key}: {folder} has several variants: {', '.join(sorted(filter(None, found)))}; choose one by `variant`"
        )
    return found.pop()


def check_variant(key: str, folder: Path, wanted: str) -> None:
    """Check that some network of a checkpoint has files of the variant ``wanted``.

    Raises:
        ValueError: none has; the message lists the variants that there are.
    """
    known = {each for part in PARTS for each in _variants(folder / part) if each}
    if wanted not in known:
        said = (
            f"it has {', '.join(sorted(known))}" if known else "its files have no variant in their names; leave it out"
        )
        raise ValueError(f"{key}: {folder} has no files of variant {wanted!r}{did_you_mean(wanted, known)}; {said}")


def _variants(folder: Path) -> set[str | None]:
    """The variants of a network's files, as ``fp16`` of ``diffusion_pytorch_model.fp16.safetensors``."""
    return {named[1] for path in folder.glob("*") if (named := _WEIGHTS.fullmatch(path.name))}


def _folder(path: Path) -> str:
    """What a folder without a UNet is."""
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        return (
            f"{path} is a run; a trained denoiser becomes a checkpoint by python tools/export.py --run "
            f"{shlex.quote(str(path))} --out FOLDER"
        )
    if (path / "config.json").is_file():
        return f"{path} is one part of a checkpoint; give the folder above it, which has model_index.json"
    other = next((part for part in ("transformer", "prior") if (path / part).is_dir()), None)
    if other:
        return f"{path} is of another architecture: it has {other}/ and no unet/; {_TAKEN}"
    files = sorted(each for each in path.glob("*") if each.suffix in SINGLE)
    if files:
        return f"{path} is not in diffusers' layout: it has no unet/config.json; {_file(files[0])}"
    return f"{path} is not a checkpoint: it has no unet/config.json; {_TAKEN}"


def check_single(key: str, path: Path) -> None:
    """Check, as far as names and shapes tell, that a file is a whole Stable Diffusion 1.x or 2.x.

    Raises:
        ValueError: it is something else; the message says what, and what to do with it.
    """
    if other := _other(path):
        raise ValueError(f"{key}: {other}")


def _file(path: Path) -> str:
    """What a file is, and what to do with it."""
    return _other(path) or (
        f"{path} is a single file; convert it into a folder in diffusers' layout once, for which the hub gives the "
        f"configs, and give that: {_command(f'P.from_single_file({_literal(path)})', path)}"
    )


def _other(path: Path) -> str:
    """What a file is, if it does not look like a whole Stable Diffusion 1.x or 2.x; otherwise nothing."""
    if path.suffix not in SINGLE:
        return f"{path} is not a checkpoint; {_TAKEN}"
    if path.suffix != ".safetensors":
        return ""  # a pickle has to be read as a whole to be told
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
        found = infer_diffusers_model_type(shapes)
    except Exception as error:
        return f"{path} cannot be read: {one_line(error, 200)}"
    if "method" in metadata and "artists" in metadata:
        return f"{path} holds artists' prompts, not a checkpoint; prompt.bank takes them, and a pipeline's `prompts`"
    if any("lora" in name for name in names):
        fused = f'p = P.from_pretrained("CHECKPOINT"); p.load_lora_weights({_literal(path)}); p.fuse_lora(); '
        command = _command(f"{fused}p.unload_lora_weights(); p", path)
        return f"{path} is a LoRA, which changes a checkpoint; fuse the two, and give the folder: {command}"
    if any(name.startswith(("down_blocks.", "text_model.", "encoder.")) for name in names):
        return f"{path} is one part of a checkpoint; give the folder that has model_index.json"
    kind = next((kind for name, kind in _SINGLE_KINDS.items() if name in found), "")
    if not kind and not any(name.startswith("model.diffusion_model.input_blocks.") for name in names):
        kind = "no Stable Diffusion 1.x or 2.x" + (f" but {found}" if found != "v1" else "")
    return f"{path} is {kind}; {_TAKEN}" if kind else ""


def _command(pipeline: str, path: Path) -> str:
    """A command, for a shell, that saves a pipeline of diffusers beside ``path``."""
    saved = f"{pipeline}.save_pretrained({_literal(path.with_suffix(''))})"
    return f"python -c {shlex.quote(f'from diffusers import StableDiffusionPipeline as P; {saved}')}"


def _literal(path: Path) -> str:
    """A path as Python reads it, in double quotes, since the command around it is in single ones."""
    return json.dumps(str(path), ensure_ascii=False)
