"""LSAST's training as the engine sees it."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel

from tasks.style_transfer.diffusion.bank import Prompt, PromptBank
from tasks.style_transfer.diffusion.prompt_task import PromptTask
from tasks.style_transfer.lsast.config import LSASTConfig
from tasks.style_transfer.lsast.control import check_controlnet, load_controlnet
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tasks.style_transfer.lsast.prompts import new_prompt
from tasks.style_transfer.lsast.routing import route


class LSASTTask(PromptTask):
    """Learn an artist's prompts, each read by some layers in one stage, from the noise in the artist's works."""

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

    @functools.cached_property
    def controlnet(self) -> ControlNetModel | None:
        """The ControlNet that the config names, if any.

        Raises:
            ValueError: it cannot be read.
        """
        return load_controlnet(self.config.controlnet) if self.config.controlnet else None

    def check_pictures(self) -> None:
        super().check_pictures()
        if self.controlnet is not None:
            check_controlnet(self.controlnet, self.unet)

    def make_pipeline(self, unet: UNet2DConditionModel, bank: PromptBank) -> LSASTPipeline:
        if self.controlnet is not None:
            self.controlnet.to(unet.device, unet.dtype)
        return LSASTPipeline(
            vae=self.vae,
            text_encoder=self.conditioner.text_encoder,
            tokenizer=self.base.tokenizer,
            unet=unet,
            scheduler=self.base.sampler(),
            controlnet=self.controlnet,
            bank=bank,
        )
