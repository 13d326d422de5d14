"""Pipelines with untrained artists, and what tests see of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from tasks.style_transfer.artbank import prompts as artbank_prompts
from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.diffusion.bank import Prompt
from tasks.style_transfer.diffusion.base import quiet
from tasks.style_transfer.diffusion.conditioner import prompt_tokens
from tasks.style_transfer.diffusion.text import encode, tokens
from tasks.style_transfer.lsast import prompts as lsast_prompts
from tasks.style_transfer.lsast.pipeline import LSASTPipeline

WIDTH = 64
STEPS = 8
METHODS = ("artbank", "lsast")


def prompt(method: str, seed: int = 0, **settings: Any) -> Prompt:
    torch.manual_seed(seed)
    if method == "artbank":
        settings = {"form": "ssam", "template": "a painting by {artist} *", "width": WIDTH, **settings}
        return artbank_prompts.new_prompt(**settings)
    return lsast_prompts.new_prompt(**{"form": "paper", "template": "*", "width": WIDTH, **settings})


def pipeline(method: str, checkpoint: Path, *artists: str, controlnet: Any = None, **settings: Any) -> Any:
    """From a folder, silent, with artists that are all different."""
    with quiet():
        if method == "artbank":
            made: Any = ArtBankPipeline.from_pretrained(checkpoint)
        else:
            made = LSASTPipeline.from_pretrained(checkpoint, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    for number, artist in enumerate(artists):
        made.bank.add(artist, prompt(method, number, **settings))
    return made


def controlnet(unet: Any, seed: int = 5) -> ControlNetModel:
    """One that adds something: its last convolutions are as random as the others."""
    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(unet)
    for part in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        nn.init.normal_(part.weight, std=0.2)
        nn.init.normal_(part.bias, std=0.2)
    return made.eval()


def content(count: int = 1, height: int = 32, width: int = 64, seed: int = 9) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def paint(made: Any, artist: str = "monet", seed: int = 0, image: Any = None, **options: Any) -> Any:
    """Latents, whose values nothing cuts off."""
    options = {"num_inference_steps": STEPS, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(seed)
    return made(content() if image is None else image, artist, generator=generator, **options).images


@contextmanager
def calls(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Inputs of each of the module's calls meanwhile: ``x``, ``t`` and those that have a name."""
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append({**dict(zip(("x", "t"), given, strict=False)), **named})

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def texts(made: Any, artist: str, stage: int, layer: int) -> Tensor:
    """What a layer reads at a stage (1, tokens, width), each text encoded for itself."""
    one = made.bank[artist].eval()
    ids, mask = prompt_tokens(made.tokenizer, artist, one)
    return encode(made.text_encoder, ids, mask, one()[stage, layer][None])


@torch.no_grad()
def no_text(made: Any, text: str = "") -> Tensor:
    return encode(made.text_encoder, tokens(made.tokenizer, [text]))
