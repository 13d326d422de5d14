"""A diffusers pipeline that repaints pictures with a frozen Stable Diffusion and a bank of artists' prompts."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from tasks.style_transfer.artbank.prompts import new_prompt
from tasks.style_transfer.diffusion.artists import ArtistPipeline
from tasks.style_transfer.diffusion.bank import PromptBank


class ArtBankPipeline(ArtistPipeline, StableDiffusionImg2ImgPipeline):
    """ArtBank (arXiv 2312.06135).

    It supports what all pipelines of diffusers support: ``to``, ``enable_model_cpu_offload``, progress bars and
    callbacks. ``ArtistPipeline.__call__`` describes how to call it.

    Example::

        pipeline = ArtBankPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", "bank.safetensors")
        pipeline(photograph, "monet").images[0].save("painted.png")
    """

    method = "artbank"
    new_prompt = staticmethod(new_prompt)

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
        bank: PromptBank | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.bank = PromptBank(self.method) if bank is None else bank
