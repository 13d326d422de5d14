"""A diffusers pipeline that repaints with a frozen Stable Diffusion, prompts by stage and layer, and a ControlNet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from tasks.style_transfer.diffusion.artists import ArtistPipeline
from tasks.style_transfer.diffusion.bank import Prompt, PromptBank
from tasks.style_transfer.diffusion.batch import batch_of
from tasks.style_transfer.images import as_pixels, as_tensor
from tasks.style_transfer.lsast.canny import canny
from tasks.style_transfer.lsast.control import NoControl, check_controlnet, load_controlnet
from tasks.style_transfer.lsast.prompts import new_prompt
from tasks.style_transfer.lsast.routing import route

logger = logging.getLogger(__name__)


class LSASTPipeline(ArtistPipeline, StableDiffusionControlNetImg2ImgPipeline):
    """LSAST (arXiv 2404.11474).

    At each step the denoiser reads the prompts of the current stage, each layer the prompt for that layer. If there is
    a ControlNet, it sees the edges of the content. Two choices are ours: the ControlNet reads the same prompts, layer
    by layer, and both networks do so for the first prediction of the stochastic inversion too.

    ``from_pretrained`` and ``from_single_file`` also take ``controlnet``: a ControlNet, or its folder or name on the
    hub. By default it is the checkpoint's own, if it has one.

    A call sets the attention processors of the denoiser and of the ControlNet (``lsast.routing``) and leaves them set.

    Example::

        base, control = "stable-diffusion-v1-5/stable-diffusion-v1-5", "lllyasviel/sd-controlnet-canny"
        pipeline = LSASTPipeline.from_pretrained(base, "bank.safetensors", controlnet=control)
        pipeline(photograph, "monet").images[0].save("painted.png")
    """

    method = "lsast"
    new_prompt = staticmethod(new_prompt)
    _optional_components = [*StableDiffusionControlNetImg2ImgPipeline._optional_components, "controlnet"]
    # State of the call that is running: pictures (N, 3, H, W) for the ControlNet, and how much it adds.
    _control: Tensor | None = None
    _scale = 1.0

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        controlnet: ControlNetModel | str | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
        bank: PromptBank | None = None,
    ) -> None:
        if isinstance(controlnet, str):
            controlnet = load_controlnet(controlnet).to(unet.device, unet.dtype)
        if controlnet is not None:
            check_controlnet(controlnet, unet)
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        if controlnet is None:
            logger.warning("LSAST without a ControlNet (`controlnet`): only the initial noise preserves the content")
            # diffusers has registered None as this component, so the stand-in is neither saved nor looked for.
            self.controlnet = NoControl()
        self.bank = PromptBank(self.method) if bank is None else bank

    @classmethod
    def _loaded(cls, load: Callable[..., Any], name: str, prompts: str | Path | None, options: dict[str, Any]) -> Any:
        given = options.pop("controlnet", None)
        controlnet = load_controlnet(given) if isinstance(given, str | Path) else given
        if controlnet is not None:  # otherwise the checkpoint's own, if it has one
            options["controlnet"] = controlnet
        pipeline = super()._loaded(load, name, prompts, options)
        if controlnet is not given:
            controlnet.to(pipeline.unet.dtype)
        return pipeline

    @property
    def controlled(self) -> bool:
        return not isinstance(self.controlnet, NoControl)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        artist: str,
        *,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """As ``ArtistPipeline.__call__``.

        Args:
            control_image: what the ControlNet sees, of the size of ``image``; by default the edges of ``image``.
            controlnet_conditioning_scale: how much the ControlNet adds; 0 adds nothing.

        Raises:
            ValueError: as ``ArtistPipeline.__call__``, or ``control_image`` does not suit the pictures or the pipeline.
        """
        if control_image is not None:
            if not self.controlled:
                raise ValueError("control_image: there is no ControlNet to see it; give from_pretrained a `controlnet`")
            pictures, control_image = batch_of("image", image), batch_of("control_image", control_image)
            if control_image.shape[2:] != pictures.shape[2:] or len(control_image) not in (1, len(pictures)):
                given, wanted = (f"{len(p)} of {p.shape[3]} x {p.shape[2]} px" for p in (control_image, pictures))
                raise ValueError(f"control_image: {given}, while image is {wanted}; give one of each, or one for all")
        self._control, self._scale = control_image, float(controlnet_conditioning_scale)
        try:
            return super().__call__(image, artist, **options)
        finally:
            self._control = None

    def prepare(self, pictures: Tensor, prompt: Prompt) -> dict[str, Any]:
        route(_plain(self.unet), prompt.settings["form"])
        if not self.controlled:
            self._control = pictures  # anything will do: NoControl does not look at it
        else:
            route(_plain(self.controlnet), prompt.settings["form"])
            if self._control is None:
                self._control = torch.stack([as_tensor(canny(as_pixels(picture))) for picture in pictures])
        if len(self._control) > 1:
            self._control = self._control.repeat_interleave(len(pictures) // len(self._control), 0)
        return {
            "control_image": self._control.expand(len(pictures), -1, -1, -1),
            "controlnet_conditioning_scale": self._scale,
        }

    def residuals(self, latents: Tensor, t: Tensor, prompt: Tensor) -> dict[str, Any]:
        assert self._control is not None, "outside of a call"
        seen = self._control.to(latents.device, self.controlnet.dtype).expand(len(latents), -1, -1, -1)
        down, middle = self.controlnet(
            latents,
            t,
            encoder_hidden_states=prompt,
            controlnet_cond=seen,
            conditioning_scale=self._scale,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def _plain(network: Any) -> Any:
    """``network`` without the wrapper that torch.compile puts around it."""
    return getattr(network, "_orig_mod", network)
