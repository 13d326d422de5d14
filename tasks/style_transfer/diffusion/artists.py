"""Code common to the pipelines of ArtBank and LSAST: image-to-image pipelines of diffusers with a bank of artists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from engine.config import at_least
from engine.utilities.text import none_of, one_line
from tasks.style_transfer.diffusion.bank import Prompt, PromptBank, load_bank
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.diffusion.batch import batch_of
from tasks.style_transfer.diffusion.checkpoint import (
    check_index,
    check_single,
    check_tokenizer,
    check_tokenizer_files,
    check_unet,
    check_width,
)
from tasks.style_transfer.diffusion.conditioner import encode_layers, prompt_tokens
from tasks.style_transfer.diffusion.inversion import StochasticInversion
from tasks.style_transfer.diffusion.text import encode, tokens
from tasks.weights import why_unreadable

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""Options of ``from_pretrained`` that configure access to the hub."""
OUTPUTS = ("pil", "np", "pt", "latent")
PROMPTS = "prompts.safetensors"
"""Name of the bank's file in the folder of a saved pipeline."""


class ArtistPipeline(StochasticInversion):
    """A mixin for image-to-image pipelines of diffusers, which then paint with an artist's prompt instead of a text.

    It comes before the pipeline's class among the bases. Subclasses define the ``method`` of their prompts and how to
    make a prompt (``new_prompt``), and set ``bank``.
    """

    method: str
    new_prompt: Callable[..., Prompt]
    bank: PromptBank
    # Attributes of diffusers' pipeline.
    unet: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: Any
    vae_scale_factor: int
    get_timesteps: Any
    maybe_free_model_hooks: Any
    _callback_tensor_inputs: Sequence[str]
    _execution_device: Any
    # State of the call that is running: prompts (times, tokens, width).
    _prompts: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, prompts: str | Path | None = None, **kwargs: Any
    ) -> Any:
        """A pipeline with the networks of a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder in diffusers' layout or a checkpoint's name on the hub, of Stable
                Diffusion 1.x or 2.x.
            prompts: the file of a bank; by default the one that ``save_pretrained`` wrote to the folder, if any.
            kwargs: as for ``DiffusionPipeline.from_pretrained``. Without a ``safety_checker`` there is none, and
                without a ``scheduler`` it becomes DDIM.

        Raises:
            ValueError: the checkpoint does not exist, is damaged or has another architecture, or the prompts do not
            fit.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        base = Base(name, key="pretrained_model_name_or_path", hub=hub, variant=kwargs.get("variant") or "")
        if base.made:
            raise ValueError(f"{name!r} names networks that are made for training; give a folder or a name on the hub")
        base.scheduler  # noqa: B018 (raises unless it is Stable Diffusion 1.x or 2.x)
        if "tokenizer" not in kwargs:
            check_tokenizer_files(base.key, name)
        kwargs["variant"] = base.variant_of("unet")
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        for part, load in (("text_encoder", base.text_encoder), ("vae", base.vae)):
            # diffusers would look for the variant of the UNet here too.
            if part not in kwargs and base.variant_of(part) != kwargs["variant"]:
                wanted = dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype
                kwargs[part] = load().to(wanted if isinstance(wanted, torch.dtype) else torch.float32)
        check_index(Path(name))
        above: Any = super()
        return cls._loaded(above.from_pretrained, name, prompts, kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, prompts: str | Path | None = None, **kwargs: Any
    ) -> Any:
        """A pipeline with the networks of a checkpoint in a single file, as ``from_pretrained`` of a folder.

        Args:
            pretrained_model_link_or_path: a file, or its address on the hub, of Stable Diffusion 1.x or 2.x.
            prompts: the file of a bank.
            kwargs: as for diffusers' ``from_single_file``; without the hub it needs ``config``, a folder in diffusers'
                layout of the same architecture.

        Raises:
            ValueError: as ``from_pretrained``.
        """
        name = str(pretrained_model_link_or_path)
        if not name.startswith(("http://", "https://")):
            if not Path(name).is_file():
                raise ValueError(f"pretrained_model_link_or_path: there is no file {name}")
            check_single("pretrained_model_link_or_path", Path(name))
        above: Any = super()
        return cls._loaded(above.from_single_file, name, prompts, kwargs)

    @classmethod
    def _loaded(cls, load: Callable[..., Any], name: str, prompts: str | Path | None, options: dict[str, Any]) -> Any:
        """What diffusers loads with ``options``, in one precision, and with DDIM and the bank."""
        if options.get("safety_checker") is None:
            options = {"feature_extractor": None, **options, "safety_checker": None, "requires_safety_checker": False}
        try:
            pipeline = load(name, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {one_line(error, 300)}") from error
        except Exception as error:
            raise ValueError(f"{name}: cannot be read: {type(error).__name__}: {why_unreadable(error)}") from error
        if not {"dtype", "torch_dtype", "text_encoder"} & options.keys():
            # transformers keeps the precision of the file, while diffusers makes its networks fp32 unless told not to.
            pipeline.text_encoder.to(pipeline.unet.dtype)
        check_unet(pipeline.unet.config, "unet", name)
        check_width(pipeline.unet.config, pipeline.text_encoder.config.hidden_size, "text_encoder", name)
        check_tokenizer(pipeline.tokenizer, pipeline.text_encoder.config.to_dict(), "tokenizer", name)
        if "scheduler" not in options:
            own = pipeline.scheduler.config
            changes = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
            pipeline.scheduler = DDIMScheduler.from_config(own, **changes)
        saved = Path(name, PROMPTS)
        if prompts is not None or saved.is_file():
            pipeline.load_prompts(saved if prompts is None else prompts)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as diffusers does, and the bank beside the networks.

        Raises:
            ValueError: the folder is a file.
        """
        above: Any = super()
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder")
        self.bank.save(folder / PROMPTS)  # first, since diffusers may upload the folder
        above.save_pretrained(save_directory, *args, **kwargs)

    def load_prompts(self, path: str | Path) -> None:
        """Add all artists in a bank's file, replacing artists of the same name.

        Raises:
            ValueError: it is not a bank of this method, or its text model had another width.
        """
        loaded = load_bank(Path(path), type(self).new_prompt, self.method, self.text_encoder.config.hidden_size)
        for artist, prompt in loaded.items():
            self.bank.add(artist, prompt)

    @property
    def artists(self) -> list[str]:
        return list(self.bank)

    @property
    def multiple(self) -> int:
        """The sides of a picture must be multiples of this, the autoencoder's reduction, as for diffusers' own."""
        return int(self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        artist: str,
        *,
        strength: float = 0.7,
        guidance_scale: float = 10.0,
        num_inference_steps: int = 50,
        inversion: str = "stochastic",
        negative_prompt: str | None = "",
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Pictures in an artist's style.

        Args:
            image: one picture, or several of the same size; see ``batch.batch_of``.
            artist: a name in ``artists``.
            strength: from 0, which returns the picture as the autoencoder reconstructs it, to 1, which leaves next to
                nothing of it. It is the share of ``num_inference_steps`` that is run.
            guidance_scale: how far to move from ``negative_prompt`` towards the artist's prompt; 1 uses only the
            latter.
            inversion: the noise to start from, ``stochastic`` (see ``inversion``) or ``none`` for plain noise.
            negative_prompt: one text for all pictures; None is the empty text.
            num_images_per_prompt: how many pictures are made of each one in ``image``; they follow one another.
            generator: a generator of torch, or a list with one per picture that is made.
            callback_on_step_end: called as diffusers does; as ``prompt_embeds`` it gets what the next step will read.

        The other arguments and the return value are those of diffusers.

        Raises:
            ValueError: the arguments do not fit together; raised before anything is computed.
        """
        pictures = batch_of("image", image)
        if not isinstance(artist, str):
            raise ValueError(f"artist: {artist!r} is not a name; a call paints in one artist's style")
        prompt = self.bank[artist]
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: {strength} is not from 0 to 1")
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale: {guidance_scale} is too small; the least is 1, no guidance")
        at_least(("num_inference_steps", num_inference_steps, 1))
        times = self.scheduler.config.num_train_timesteps
        if num_inference_steps >= times:
            raise ValueError(f"num_inference_steps: {num_inference_steps} is too large; the most is {times - 1}")
        self.check_inversion(inversion)
        if not isinstance(negative_prompt, str | None):
            raise ValueError(f"negative_prompt: {negative_prompt!r} is no text; a call has one for all pictures")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: {none_of(output_type, OUTPUTS)}")
        at_least(("num_images_per_prompt", num_images_per_prompt, 1))
        pictures = pictures.repeat_interleave(num_images_per_prompt, 0)
        if isinstance(generator, list | tuple):
            generator = list(generator)
            if len(generator) != len(pictures):
                raise ValueError(
                    f"generator: a list of {len(generator)} for {len(pictures)} pictures; give one, or one per picture"
                )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(f"callback_on_step_end_tensor_inputs: {none_of(name, self._callback_tensor_inputs)}")
        height, width = pictures.shape[2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"image: {width} x {height} px; sides must be multiples of {self.multiple}; resize or pad it, or use "
                "tools/stylize.py, which does"
            )
        above: Any = super()
        if int(num_inference_steps * strength) == 0:
            return self._reconstructed(pictures, output_type, return_dict)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps, _ = self.get_timesteps(num_inference_steps, strength, "cpu")
        more = self.prepare(pictures, prompt)
        try:
            self.inversion = inversion
            self._prompts, nothing = self._encoded(artist, negative_prompt or "")
            nothing = nothing.expand(len(pictures), -1, -1)
            if len(self._prompts) > 1:
                callback_on_step_end = self._turning(timesteps, nothing, callback_on_step_end)
            return above.__call__(
                image=pictures,
                strength=strength,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                prompt_embeds=self.prompt_at(timesteps[0], len(pictures)),
                negative_prompt_embeds=nothing,
                generator=generator,
                output_type=output_type,
                return_dict=return_dict,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
                **more,
            )
        finally:
            self.inversion, self._prompts = "none", None

    def prepare(self, pictures: Tensor, prompt: Prompt) -> dict[str, Any]:
        """More arguments with which diffusers' pipeline paints ``pictures`` (N, 3, H, W) by ``prompt``."""
        return {}

    def prompt_at(self, t: Tensor, count: int) -> Tensor:
        """What the denoiser reads at timestep ``t``: (count, tokens, width)."""
        assert self._prompts is not None, "outside of a call"
        part = int(t) * len(self._prompts) // self.scheduler.config.num_train_timesteps
        return self._prompts[part].expand(count, -1, -1)

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        prompt = self.prompt_at(t[0], len(latents))
        more = self.residuals(latents, t, prompt)
        found: Tensor = self.unet(latents, t, encoder_hidden_states=prompt, return_dict=False, **more)[0]
        return found

    def residuals(self, latents: Tensor, t: Tensor, prompt: Tensor) -> dict[str, Any]:
        """More arguments for the denoiser."""
        return {}

    def _encoded(self, artist: str, negative_prompt: str) -> tuple[Tensor, Tensor]:
        """The artist's encoded prompts (times, tokens, width) and the encoded negative prompt (1, tokens, width)."""
        device, prompt = self._execution_device, self.bank[artist]
        training = prompt.training
        # In training mode torch's layers use other kernels, whose results differ in the last bits.
        vectors = prompt.to(device).eval()()
        prompt.train(training)
        tables = prompt_tokens(self.tokenizer, artist, prompt)
        ids, mask = (table.to(device).expand(len(vectors), -1) for table in tables)
        nothing = encode(self.text_encoder, tokens(self.tokenizer, [negative_prompt]).to(device))
        return encode_layers(self.text_encoder, ids, mask, vectors), nothing.repeat(1, vectors.shape[1], 1)

    def _turning(self, timesteps: Tensor, nothing: Tensor, callback: Any) -> Any:
        """A callback that gives the denoiser the prompt of its next step, and then calls ``callback``, if any."""

        def end_of_step(pipeline: Any, step: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
            found = {}
            if step + 1 < len(timesteps):
                following = self.prompt_at(timesteps[step + 1], len(nothing))
                guided = pipeline.do_classifier_free_guidance
                found["prompt_embeds"] = torch.cat([nothing, following]) if guided else following
            if callback is None:
                return found
            seen = {name: found.get(name, value) for name, value in given.items()}
            return {**found, **callback(pipeline, step, t, seen)}

        return end_of_step

    def _reconstructed(self, pictures: Tensor, output_type: str, return_dict: bool) -> Any:
        image = self.image_processor.preprocess(pictures)
        latents = self.content_latents(image, self.vae.dtype, self._execution_device, mode="argmax")
        if output_type == "latent":
            found = latents
        else:
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            found = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images=found, nsfw_content_detected=None) if return_dict else (found, None)
