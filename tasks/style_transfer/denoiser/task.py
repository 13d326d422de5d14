"""The denoiser's training as the engine sees it."""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from engine.network.chain import Chain, Unit
from engine.network.frozen import leave_out_frozen
from engine.network.message import Message
from engine.network.shapes import evaluating
from engine.run.export import TORCH_FILES
from engine.utilities.console import console
from engine.utilities.files import made_once, replaced
from engine.utilities.seed import derive
from tasks.style_transfer.denoiser.config import DenoiserConfig
from tasks.style_transfer.diffusion.base import freeze, quiet
from tasks.style_transfer.diffusion.chain import TimeEmbedding, example, unet_units
from tasks.style_transfer.diffusion.data import read_resized
from tasks.style_transfer.diffusion.evaluate import PictureMaker, whole_here
from tasks.style_transfer.diffusion.task import DiffusionTask
from tasks.style_transfer.diffusion.text import encode, tokens
from tasks.style_transfer.images import as_pixels, write_image
from tasks.style_transfer.sheet import contact_sheet

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
OWN, NO_TEXT = "own", "no_text"
FILES = (".safetensors", ".onnx", *TORCH_FILES)


class DenoiserTask(DiffusionTask):
    """Predict the noise in latents of pictures from their texts, as in Stable Diffusion's own training."""

    name = "style_transfer/denoiser"
    smoke = {
        "glcan, fp16": ("--local.precision", "fp16", "--model.time", "frozen"),
        # On a CPU, compiling takes minutes of C++ per layer; tests/tasks/style_transfer/denoiser only trace the layers.
        "glcan, compiled": None,
        "LoRA": ("--model.trains", "lora"),
    }
    config: DenoiserConfig

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.export_name = "checkpoint" if config.model.trains == "full" else "lora.safetensors"
        self._encoded: dict[str, Tensor] = {}

    def denoiser_of(self, model: nn.Module) -> UNet2DConditionModel:
        assert isinstance(model, UNet2DConditionModel)
        return model

    def make_chain(self, *, weights: bool) -> Chain:
        settings, unet = self.config.model, self.base.unet(weights=weights)
        full = settings.trains == "full"
        if not full:
            from peft import LoraConfig

            freeze(unet)
            rank = settings.lora_rank
            unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
            )
            leave_out_frozen(unet)
        elif settings.time == "frozen":
            freeze(unet.time_embedding)
        shared = full and settings.time == "learns"
        units, head = unet_units(unet, shared_time=shared, shared_prompt=False)
        return Chain(
            unet,
            units,
            head,
            example(unet, self.side, self.base.text_shape()[0]),
            shared=Unit("time", TimeEmbedding(unet), _embed_time) if shared else None,
            shared_names=("time",) if shared else (),
        )

    def conditions(
        self, works: Tensor, words: Sequence[str], luck: Tensor | None, kinds: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        every = self.works(test=bool(kinds))
        names = [self.collections[every[work][1]].name for work in works.tolist()]
        texts = [
            f"{name} {seen}" if self.config.data.describe else name for name, seen in zip(names, words, strict=True)
        ]
        if kinds:
            empty = [kind == NO_TEXT for kind in kinds]
        else:
            assert luck is not None
            empty = (luck < self.config.data.drop_text).tolist()
        return {"prompt": self._encode(["" if none else text for none, text in zip(empty, texts, strict=True)])}

    @functools.cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, kept in main memory, since every text is encoded only once."""
        return self.base.text_encoder()

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Encoded texts (texts, tokens, width); each text is encoded once and then remembered."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._encoded))
        if missing:
            encoded = encode(self.text_encoder, tokens(self.base.tokenizer, missing))
            self._encoded.update(zip(missing, encoded, strict=True))
        return torch.stack([self._encoded[text] for text in texts])

    def example_conditions(self, samples: int) -> dict[str, Tensor]:
        return {"prompt": torch.zeros(samples, *self.base.text_shape())}

    def test_kinds(self) -> list[str]:
        return [OWN, NO_TEXT]

    def picture_maker(self) -> PictureMaker | None:
        return self._sample if self.config.pictures.count else None

    @torch.no_grad()
    def _sample(self, folder: Path) -> dict[str, float]:
        """Write samples.png: a held-out work of each collection, and beside it samples of the collection's name."""
        if not whole_here(self.model):
            console.print("the denoiser is on several ranks: tools/evaluate.py makes the pictures")
            return {}
        settings, unet = self.config.pictures, self.unet
        pipeline = self.pipeline()
        rows, start = {}, time.perf_counter()
        names = [each.name for each in self.collections]
        with evaluating([unet]):
            for row, name in enumerate(names):
                for column in range(settings.count):
                    generator = torch.Generator().manual_seed(derive(self.config.train.seed, "picture", name, column))
                    (picture,) = pipeline(
                        prompt_embeds=self._encode([name]).to(unet.device),
                        negative_prompt_embeds=self._encode([""]).to(unet.device),
                        height=self.config.data.size,
                        width=self.config.data.size,
                        num_inference_steps=settings.steps,
                        guidance_scale=settings.guidance,
                        generator=generator,
                        output_type="pt",
                    ).images
                    rows[row, column] = as_pixels(picture)
        seconds = (time.perf_counter() - start) / max(1, len(rows))
        works = [next(path for path, number in self.works(test=True) if number == row) for row in range(len(names))]
        shown = [read_resized(path, self.config.data.size) for path in works]
        headings = [torch.ones(3, 8, 8)] * settings.count  # white squares: no painting heads a column
        write_image(folder / "samples.png", contact_sheet(shown, headings, rows))
        return {"seconds_a_picture": seconds}

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline of diffusers with this denoiser, without a progress bar."""
        with quiet():
            made = StableDiffusionPipeline(
                vae=self.vae.to(self.unet.device),
                text_encoder=None,  # texts are passed encoded
                tokenizer=self.base.tokenizer,
                unet=self.unet,
                scheduler=self.base.sampler(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        made.set_progress_bar_config(disable=True)
        return made

    def write_export(self, target: Path) -> str:
        """Write what diffusers loads, a folder with the whole checkpoint or a file of LoRA; return what was written.

        Raises:
            ValueError: ``target`` is a file for a whole checkpoint, or not a safetensors file for LoRA's matrices.
        """
        if self.config.model.trains == "full":
            if target.suffix in FILES:
                raise ValueError(
                    f"--out: {target} is a file; a checkpoint in diffusers' layout is a folder: "
                    f"--out {shlex.quote(str(target.with_suffix('')))}"
                )
            if target.exists():
                raise ValueError(f"--out: {target} is there already; choose another folder, or remove it")
            with made_once(target) as folder, quiet():
                self.base.save(folder, self.unet.cpu(), self.vae.cpu())
            return f"a checkpoint in diffusers' layout in {target}"
        if target.suffix != ".safetensors":
            raise ValueError(f"--out: {target} must end in .safetensors, as diffusers' load_lora_weights reads it")
        from peft import get_peft_model_state_dict

        matrices = get_peft_model_state_dict(self.unet)
        with replaced(target) as partial:
            StableDiffusionPipeline.save_lora_weights(partial.parent, matrices, weight_name=partial.name)
        return f"{len(matrices)} matrices in {target}"


def _embed_time(time: nn.Module, message: Message) -> Message:
    features = {**message.features, "time": time(message.features["t"], message.x)}
    return replace(message, features=features)
