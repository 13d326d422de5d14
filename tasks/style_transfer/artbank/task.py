"""ArtBank's training as the engine sees it."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from tasks.style_transfer.artbank.config import ArtBankConfig
from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.artbank.prompts import new_prompt
from tasks.style_transfer.diffusion.bank import Prompt, PromptBank
from tasks.style_transfer.diffusion.prompt_task import PromptTask


class ArtBankTask(PromptTask):
    """Learn an artist's prompt from the noise in the artist's works."""

    name, method = "style_transfer/artbank", "artbank"
    config: ArtBankConfig

    @property
    def settings(self) -> dict[str, Any]:
        prompt = self.config.prompt
        return {"form": prompt.form, "template": prompt.template, "tokens": prompt.tokens, "rows": prompt.rows}

    def new_prompt(self, **settings: Any) -> Prompt:
        return new_prompt(**settings)

    def make_pipeline(self, unet: UNet2DConditionModel, bank: PromptBank) -> ArtBankPipeline:
        return ArtBankPipeline(
            vae=self.vae,
            text_encoder=self.conditioner.text_encoder,
            tokenizer=self.base.tokenizer,
            unet=unet,
            scheduler=self.base.sampler(),
            bank=bank,
        )
