"""LSAST's training as the engine sees it."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from tasks.style_transfer.diffusion.bank import Prompt, PromptBank
from tasks.style_transfer.diffusion.prompt_task import PromptTask
from tasks.style_transfer.lsast.config import LSASTConfig
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tasks.style_transfer.lsast.prompts import new_prompt
from tasks.style_transfer.lsast.routing import route


class LSASTTask(PromptTask):
    """Noise in an artist's works to the artist's prompts, each read at its stage by its layers."""

    name, method = "style_transfer/lsast", "lsast"
    config: LSASTConfig

    @property
    def settings(self) -> dict[str, Any]:
        prompt = self.config.prompt
        return {"form": prompt.form, "template": prompt.template, "stages": prompt.stages}

    def new_prompt(self, **settings: Any) -> Prompt:
        return new_prompt(**settings)

    def prepare(self, unet: UNet2DConditionModel) -> None:
        route(unet, self.config.prompt.form)

    def make_pipeline(self, unet: UNet2DConditionModel, bank: PromptBank) -> LSASTPipeline:
        return LSASTPipeline(
            vae=self.vae,
            text_encoder=self.conditioner.text_encoder,
            tokenizer=self.base.tokenizer,
            unet=unet,
            scheduler=self.base.sampler(),
            controlnet=self.config.controlnet or None,
            bank=bank,
        )
