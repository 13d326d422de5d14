"""The Stable Diffusion checkpoint that everything builds on: loaded or newly made, and checked."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.utilities.seed import seeded
from tasks.style_transfer.diffusion.checkpoint import (
    check_folder,
    check_tokenizer,
    check_tokenizer_files,
    check_unet,
    check_variant,
    check_width,
    variant_in,
)
from tasks.style_transfer.diffusion.tokenizer import LENGTH, tiny_tokenizer
from tasks.style_transfer.measures import first_sentence

SCALE = 8
"""Pixels per latent along a side, for every autoencoder of Stable Diffusion 1.x and 2.x."""
TRAINING_TIMES = 1000
PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a denoiser may predict: the noise, the velocity, or the latents without noise."""

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": TRAINING_TIMES,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_SD_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_SD_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        },
        "text_encoder": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
            "max_position_embeddings": LENGTH,
        },
        "vae": {},
    },
    "sd1": {"unet": _SD_UNET, "text_encoder": _SD_TEXT, "vae": _SD_VAE},
    "sd2": {
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        "vae": _SD_VAE,
    },
}
"""Configs of untrained networks by name; all other settings are the defaults of diffusers and transformers."""
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "runwayml/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "stabilityai/stable-diffusion-2-base": "sd2",
    "stabilityai/stable-diffusion-2-1-base": "sd2",
}
"""The size of checkpoints on the hub, so that an estimate downloads nothing."""


@dataclass
class Base:
    """The parts of a Stable Diffusion 1.x or 2.x checkpoint; each part is read when it is first asked for.

    Args:
        name: a folder in diffusers' layout, a checkpoint's name on the hub, or a name in ``SIZES`` for untrained
        networks.
        seed: seed of untrained networks.
        key: config key or argument that gives the name, for error messages.
        hub: options for access to the hub (``revision``, ``token``, ``cache_dir``, ...), as diffusers takes them.
        variant: variant of the weights' files, as ``fp16``; empty takes files without one, or a folder's only variant.

    Every part raises a ValueError of one line if the checkpoint does not exist or is not Stable Diffusion 1.x or 2.x.
    """

    name: str
    seed: int = 0
    key: str = "model.pretrained"
    hub: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def made(self) -> bool:
        """Whether the networks are newly made and untrained."""
        return self.name in SIZES

    @property
    def _known(self) -> str | None:
        """The size of the networks, where no config has to be read for it."""
        return self.name if self.made else HUB.get(self.name)

    def unet(self, *, weights: bool = True) -> UNet2DConditionModel:
        """The denoiser; without ``weights`` all its parameters hold the same value, and only their shapes matter."""
        return self._part("unet", UNet2DConditionModel, UNet2DConditionModel, weights)

    def text_encoder(self, *, weights: bool = True) -> CLIPTextModel:
        """Maps tokens to what the denoiser's cross-attention reads; in evaluation mode."""
        if self.name in SIZES and weights:
            # transformers draws embeddings so small that an untrained model hardly tells texts apart.
            encoder = self._part("text_encoder", CLIPTextModel, _new_text, True)
            with seeded(self.seed, "tokens"):
                nn.init.normal_(encoder.get_input_embeddings().weight)
            return encoder.eval()
        encoder = self._part("text_encoder", CLIPTextModel, _new_text, weights).eval()
        if self._known is None:
            check_width(self._unet_config, encoder.config.hidden_size, self.key, self.name)
        return encoder

    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        """The autoencoder; for ``tiny`` an untrained one, whose weights must still be loaded."""
        kind = AutoencoderTiny if self.name == "tiny" else AutoencoderKL
        if not self.made and "Tiny" in str(self._config("vae").get("_class_name")):
            kind = AutoencoderTiny
        return self._part("vae", kind, kind, True).eval()

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer; ``sd1`` and ``sd2``, whose vocabulary would have to be downloaded, use that of ``tiny``."""
        if self.made:
            tokenizer = tiny_tokenizer()
            tokenizer.model_max_length = LENGTH if self.name == "tiny" else 77
            return tokenizer
        check_tokenizer_files(self.key, self._checked)
        tokenizer = self._loaded(
            "tokenizer", lambda: CLIPTokenizer.from_pretrained(self._checked, subfolder="tokenizer", **self.hub)
        )
        check_tokenizer(tokenizer, self._config("text_encoder"), self.key, self.name)
        return tokenizer

    def tokenizer_like(self, *, weights: bool) -> CLIPTokenizer:
        """The tokenizer; without ``weights`` only its length matters, so another of that length saves a download."""
        if weights or self.made or self.name not in HUB:
            return self.tokenizer
        return Base(HUB[self.name]).tokenizer

    def text_shape(self) -> tuple[int, int]:
        """Number of tokens and width of an encoded text."""
        if self._known is None:
            config = self._config("text_encoder")
            check_width(self._unet_config, config["hidden_size"], self.key, self.name)
        else:
            config = SIZES[self._known]["text_encoder"]
        return config.get("max_position_embeddings", 77), config["hidden_size"]

    @functools.cached_property
    def scheduler(self) -> DDPMScheduler:
        """The amount of noise at each timestep, and what the denoiser predicts (``prediction_type``).

        Raises:
            ValueError: as the class, or the denoiser predicts something unknown.
        """
        if self.made:
            return DDPMScheduler(**{key: value for key, value in _SCHEDULE.items() if key != "set_alpha_to_one"})
        scheduler: DDPMScheduler = self._loaded(
            "scheduler", lambda: DDPMScheduler.from_pretrained(self._checked, subfolder="scheduler", **self.hub)
        )
        kind = scheduler.config.prediction_type
        if kind not in PREDICTIONS:
            raise ValueError(
                f"{self.key}: the denoiser of {self.name} predicts {kind!r}, as its scheduler says; known: "
                f"{', '.join(PREDICTIONS)}"
            )
        return scheduler

    def sampler(self) -> DDIMScheduler:
        """A DDIM sampler with the same noise schedule."""
        config = _SCHEDULE if self.made else self.scheduler.config
        return DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    def save(self, folder: Path, unet: UNet2DConditionModel, vae: nn.Module) -> None:
        """Write the checkpoint in diffusers' layout, with ``unet`` and ``vae`` instead of its own."""
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder(),
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    def variant_of(self, part: str) -> str | None:
        """The variant of the files of ``unet``, ``text_encoder`` or ``vae`` that is read; None for plain files.

        Raises:
            ValueError: as the class, or there are several variants, of which the user must choose one.
        """
        folder, wanted = Path(self._checked), self.variant or None
        return variant_in(self.key, folder / part, wanted) if folder.is_dir() else wanted

    def _part(self, part: str, kind: Any, make: Any, weights: bool) -> Any:
        if self._known and (self.made or not weights):
            config = SIZES[self._known][part]
            if not weights:
                return _for_shapes(lambda: make(**config))
            with seeded(self.seed, part):
                return make(**config)
        if not weights:
            config = self._config(part)
            if part == "text_encoder":
                return _for_shapes(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
            return _for_shapes(lambda: kind.from_config(config))
        # fp32, whatever precision the file has: weights that learn need it, and so do the weights they work with.
        options = {"subfolder": part, "variant": self.variant_of(part), **self.hub}
        return self._loaded(part, lambda: kind.from_pretrained(self._checked, **options)).float()

    def _config(self, part: str) -> dict[str, Any]:
        kind = CLIPTextConfig if part == "text_encoder" else None

        def read() -> dict[str, Any]:
            if kind is not None:
                return dict(kind.from_pretrained(self._checked, subfolder=part, **self.hub).to_dict())
            return dict(UNet2DConditionModel.load_config(self._checked, subfolder=part, **self.hub))

        return dict(self._loaded(part, read))

    @property
    def _checked(self) -> str:
        """The name of the checkpoint, after a check that it is of the right kind."""
        assert self._unet_config
        return self.name

    @functools.cached_property
    def _unet_config(self) -> dict[str, Any]:
        """The config of the denoiser, after a check of the kind of checkpoint and of the variant."""
        check_folder(self.key, self.name)
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # from the hub's own library
                config = UNet2DConditionModel.load_config(self.name, subfolder="unet", **self.hub)
        except Exception as error:
            here = Path(self.name).is_dir()
            where = "" if here else "it is no folder here, and the hub does not give it: "
            raise ValueError(f"{self.key}: {self.name} cannot be read: {where}{first_sentence(error)}") from error
        check_unet(config, self.key, self.name)
        if self.variant and Path(self.name).is_dir():
            check_variant(self.key, Path(self.name), self.variant)
        return dict(config)

    def _loaded(self, part: str, load: Any) -> Any:
        name = self._checked
        try:
            with quiet():
                return load()
        except Exception as error:
            raise ValueError(f"{self.key}: {part} of {name} cannot be read: {first_sentence(error)}") from error


def _new_text(**config: Any) -> CLIPTextModel:
    vocabulary = {"vocab_size": len(tiny_tokenizer())} if config["hidden_size"] < 768 else {}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    if vocabulary:
        ends = {"bos_token_id": vocabulary["vocab_size"] - 2, "eos_token_id": vocabulary["vocab_size"] - 1}
    with quiet():
        return CLIPTextModel(CLIPTextConfig(**config, **vocabulary, **ends))


def _for_shapes(make: Callable[[], Any]) -> Any:
    """What ``make`` makes, but without drawing random weights, which takes seconds at real sizes."""

    def keep(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    before = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, keep)
        with quiet():
            made = make()
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.01)  # otherwise it would hold whatever was in memory
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries log while loading; errors are still raised, and reported by us."""
    loggers = [logging.getLogger("transformers"), logging.getLogger("diffusers")]
    levels = [logger.level for logger in loggers]
    bars = [library for library in (diffusers, transformers) if library.utils.logging.is_progress_bar_enabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for library in bars:
            library.utils.logging.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library in bars:
            library.utils.logging.enable_progress_bar()


def freeze(*modules: nn.Module) -> None:
    """Exclude all parameters of ``modules`` from training."""
    for module in modules:
        module.requires_grad_(False)


def to_latents(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and deviation of the latents of ``pictures`` (N, 3, H, W) from 0 to 1; TAESD has no deviation."""
    encoded = vae.encode(pictures * 2 - 1)
    scale = vae.config.scaling_factor
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale
    return encoded.latents * scale, None
