"""ArtBank's stochastic inversion: start from the noise that the denoiser predicts in the content."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor

from engine.utilities.text import none_of

INVERSIONS = ("stochastic", "none")


class StochasticInversion:
    """A mixin for image-to-image pipelines of diffusers, which replaces how they make the latents to start from.

    ArtBank (arXiv 2312.06135, section 3.4): add random noise to the content's latents, predict the noise in them once,
    and add the *predicted* noise to the content's latents::

        x_t = sqrt(a_t) z + sqrt(1 - a_t) noise,  found = denoiser(x_t, t),  start = sqrt(a_t) z + sqrt(1 - a_t) found

    The pipeline sets ``inversion`` during a call; otherwise latents are made as in diffusers.
    """

    inversion: str = "none"
    scheduler: Any
    vae: Any

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        """The denoiser's prediction for ``latents`` (N, 4, h, w) at timesteps ``t`` (N), without guidance."""
        raise NotImplementedError

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Any = None,
    ) -> Tensor:
        """Replaces the pipeline's method of this name, which its ``__call__`` calls."""
        rest = batch_size, num_images_per_prompt, dtype, device, generator
        base: Any = super()
        if self.inversion == "none":
            plain: Tensor = base.prepare_latents(image, timestep, *rest)
            return plain
        latents = self.content_latents(image, dtype, device, generator)
        # Given latents instead of a picture, the pipeline's own method only adds noise.
        noised = base.prepare_latents(latents, timestep, *rest)
        found = self.predict(self.scheduler.scale_model_input(noised, timestep[0]), timestep)
        if self.scheduler.config.prediction_type == "v_prediction":
            # v = sqrt(a) noise - sqrt(1 - a) z, hence noise = sqrt(a) v + sqrt(1 - a) x_t: add_noise computes this sum
            # with v as latents and x_t as noise.
            found = self.scheduler.add_noise(found, noised, timestep)
        start: Tensor = self.scheduler.add_noise(latents, found, timestep)
        return start

    def content_latents(
        self, image: Tensor, dtype: torch.dtype, device: torch.device, generator: Any = None, mode: str = "sample"
    ) -> Tensor:
        """Latents (N, 4, h, w) of ``image`` (N, 3, H, W), whose values are from -1 to 1.

        Args:
            generator: a generator, or a list with one per picture.
            mode: ``sample`` draws the latents, as diffusers does; ``argmax`` returns the most likely ones.
        """
        image = image.to(device=device, dtype=dtype)
        if isinstance(generator, list):
            pairs = zip(image.split(1), generator, strict=True)
            found: Tensor = torch.cat([retrieve_latents(self.vae.encode(each), own, mode) for each, own in pairs])
        else:
            found = retrieve_latents(self.vae.encode(image), generator, mode)
        scale: float = self.vae.config.scaling_factor
        return found * scale

    def check_inversion(self, inversion: str) -> None:
        """Check that an inversion exists and works with the scheduler.

        Raises:
            ValueError: it does not exist, or does not work with the scheduler.
        """
        if inversion not in INVERSIONS:
            raise ValueError(f"inversion: {none_of(inversion, INVERSIONS)}")
        kind = self.scheduler.config.prediction_type
        known = kind == "epsilon" or (kind == "v_prediction" and isinstance(self.scheduler, DDIMScheduler))
        if inversion == "stochastic" and not known:
            raise ValueError(
                f"inversion: a {type(self.scheduler).__name__} that predicts {kind} is unknown to it; take a "
                "DDIMScheduler, or inversion 'none'"
            )
