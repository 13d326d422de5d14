"""Code common to the tasks ArtBank and LSAST: prompts for a frozen denoiser, learnt from an artist's works."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from engine.network.chain import Chain, Unit
from engine.network.frozen import leave_out_frozen
from engine.network.message import Message
from engine.network.shapes import evaluating
from engine.utilities.console import console
from engine.utilities.seed import seeded
from tasks.style_transfer.diffusion.bank import Prompt, PromptBank, load_bank
from tasks.style_transfer.diffusion.base import TRAINING_TIMES, freeze, quiet
from tasks.style_transfer.diffusion.chain import example, unet_units
from tasks.style_transfer.diffusion.conditioner import Conditioner
from tasks.style_transfer.diffusion.data import pictures_in, read_resized
from tasks.style_transfer.diffusion.evaluate import PictureMaker, whole_here
from tasks.style_transfer.diffusion.painter import ArtistPainter
from tasks.style_transfer.diffusion.pictures import Repainting
from tasks.style_transfer.diffusion.prompt_config import PromptTaskConfig
from tasks.style_transfer.diffusion.task import DiffusionTask

OWN, NOTHING, RANDOM, OTHER = "own", "none", "random", "other"


class Prompted(nn.Module):
    """A frozen denoiser and the prompts that are trained with it."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner


class PromptTask(DiffusionTask):
    """Learn a prompt for each collection's artist; everything else is frozen.

    The prompts are a shared encoder (``engine.learning.shared``): every block gets them as a leaf of its own, the
    leaves' gradients are summed, and one backward pass runs through the text model and the modules that make the
    prompts. A block's own weights never change. Its gradient comes from its local loss, through an auxiliary network
    that does learn.
    """

    method: str
    export_name = "bank.safetensors"
    smoke = {
        "glcan, fp16": None,  # each block would scale its part of the prompts' gradient by its own loss scale
        "glcan, compiled": None,  # too slow on a CPU, as for the denoiser
        "released": ("--prompt.form", "released"),
    }
    config: PromptTaskConfig

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings of new prompts (``form``, ``template``, ...) other than those that the checkpoint determines."""

    @abstractmethod
    def new_prompt(self, **settings: Any) -> Prompt:
        """Make an untrained prompt."""

    @abstractmethod
    def make_pipeline(self, unet: UNet2DConditionModel, bank: PromptBank) -> Any:
        """The diffusers pipeline of the method."""

    def prepare(self, unet: UNet2DConditionModel) -> None:
        """Have the layers of a denoiser read their prompts, if that takes any preparation."""

    @property
    def bank_file(self) -> str:
        """File of the bank to continue from, or empty."""
        return str(self.config.prompt.bank)  # type: ignore[attr-defined]

    def denoiser_of(self, model: nn.Module) -> UNet2DConditionModel:
        assert isinstance(model, Prompted)
        return model.unet

    @property
    def conditioner(self) -> Conditioner:
        assert isinstance(self.model, Prompted)
        return self.model.conditioner

    @property
    def artists(self) -> list[str]:
        """The artists whose prompts learn."""
        return list(self.config.data.collections)

    def make_chain(self, *, weights: bool) -> Chain:
        unet, text = self.base.unet(weights=weights), self.base.text_encoder(weights=weights)
        freeze(unet, text)
        self.prepare(unet)
        if weights and self.base.made:
            console.print(
                f"model.pretrained: {self.base.name} is untrained: prompts learn, but it cannot paint any style"
            )
        conditioner = self._conditioner(text, weights)
        model = Prompted(unet, conditioner)
        leave_out_frozen(model)
        units, head = unet_units(unet, shared_time=False, shared_prompt=True)
        given = example(unet, self.side, 1)
        features = {"x": given.x, "t": given.features["t"], **self.example_conditions(2)}
        return Chain(
            model,
            units,
            head,
            Message(features),
            shared=Unit("prompts", conditioner, _condition),
            shared_names=("prompt",),
        )

    def _conditioner(self, text: Any, weights: bool) -> Conditioner:
        """Encodes a learning prompt for each artist, and for comparison one that stays as random as the other was."""
        width = text.config.hidden_size
        scale = float(text.get_input_embeddings().weight.std()) if weights else 1.0
        settings = {**self.settings, "width": width, "scale": scale, "base": self.base.name}
        known = PromptBank(self.method)
        if self.bank_file:
            known = load_bank(Path(self.bank_file), self.new_prompt, self.method, width)
        learning, random = dict[str, Prompt](), dict[str, Prompt]()
        for artist in self.artists:
            with seeded(self.config.train.seed, "prompt", artist):
                new = self.new_prompt(**settings)
            learning[artist] = known.get(artist, new)
            own = learning[artist].settings
            for key in ("form", "tokens", "stages"):
                if own.get(key) != settings.get(key, own.get(key)):
                    raise ValueError(
                        f"prompt.{key}: that of {artist!r} is {own[key]!r} in {self.bank_file}, the config says "
                        f"{settings[key]!r}"
                    )
            template = str(own["template"]).replace("{artist}", artist)
            with seeded(self.config.train.seed, "random prompt", artist):
                still = self.new_prompt(**{key: own[key] for key in own if key != "method"} | {"template": template})
            freeze(still)
            random[f"{artist} (random)"] = still
        tokenizer = self.base.tokenizer_like(weights=weights)
        times = self.base.scheduler.config.num_train_timesteps if weights else TRAINING_TIMES
        return Conditioner({**learning, **random}, text, tokenizer, times)

    def bank(self) -> PromptBank:
        """The learnt prompts, and the other prompts of the bank that the config names.

        Raises:
            ValueError: that file is not a bank of this method.
        """
        bank = PromptBank(self.method)
        if self.bank_file:
            bank = load_bank(Path(self.bank_file), self.new_prompt, self.method)
        for artist, prompt in zip(self.artists, self.conditioner.prompts.values(), strict=False):
            assert isinstance(prompt, Prompt)
            bank.add(artist, prompt)
        return bank

    def example_conditions(self, samples: int) -> dict[str, Any]:
        return {"row": torch.zeros(samples, dtype=torch.long), "present": (0,)}

    def conditions(
        self, works: Tensor, words: Sequence[str], luck: Tensor | None, kinds: Sequence[str] = ()
    ) -> dict[str, Any]:
        numbers = torch.tensor([number for _, number in self.works(test=bool(kinds))])[works]
        if not kinds:
            return {"row": numbers, "present": tuple(sorted(set(numbers.tolist())))}
        count = len(self.artists)
        rows = {
            OWN: numbers,
            OTHER: (numbers + 1) % count,
            RANDOM: numbers + count,
            NOTHING: torch.full_like(numbers, self.conditioner.nothing),
        }
        chosen = torch.stack([rows[kind][place] for place, kind in enumerate(kinds)])
        return {"row": chosen, "present": tuple(sorted(set(chosen.tolist())))}

    def test_kinds(self) -> list[str]:
        """With several artists, ``other`` is the artist after a work's own."""
        return [OWN, NOTHING, RANDOM, *([OTHER] if len(self.artists) > 1 else [])]

    def picture_maker(self) -> PictureMaker | None:
        settings, size = self.config.pictures, self.config.data.size
        if not settings.count:
            return None
        paths = pictures_in("pictures.contents", settings.contents)[: settings.count]
        self.check_pictures()
        contents = [_middle(read_resized(path, size), size) for path in paths]
        works = {
            each.name: [_middle(read_resized(path, size), size) for path in each.test[: self.config.data.tests]]
            for each in self.collections
        }
        repaint = Repainting(contents, works, settings, self.config.train.seed)

        def make(folder: Path) -> dict[str, float]:
            if not whole_here(self.model):
                console.print("the denoiser is on several ranks: tools/evaluate.py makes the pictures")
                return {}
            with evaluating([self.unet, self.conditioner]):
                return repaint(self.pipeline(), folder)

        return make

    def check_pictures(self) -> None:
        """Check, before training, that pictures can be made.

        Raises:
            ValueError: the kind of inversion does not suit what the denoiser predicts.
        """
        kind = self.base.scheduler.config.prediction_type
        if self.config.pictures.inversion == "stochastic" and kind == "sample":
            raise ValueError(
                f"pictures.inversion: stochastic knows no denoiser that predicts {kind!r}, as that of {self.base.name} "
                "does; set it to none"
            )

    def pipeline(self) -> Any:
        """The method's pipeline with the learnt prompts, without a progress bar."""
        with quiet():
            self.vae.to(self.unet.device)
            made = self.make_pipeline(self.unet, self.bank())
        made.set_progress_bar_config(disable=True)
        return made

    def painter(self, chain: Chain, predict: Callable[[Message], Any]) -> ArtistPainter:
        try:
            works = {each.name: each.test[0] for each in self.collections}
        except ValueError:
            works = {}  # the works may not be on this machine, and are only shown
        return ArtistPainter(self.pipeline(), self.config.pictures, works)

    def write_export(self, target: Path) -> str:
        """Write the bank with the learnt prompts.

        Raises:
            ValueError: the file's name does not end in .safetensors.
        """
        if target.suffix != ".safetensors":
            raise ValueError(f"--out: {target} must end in .safetensors, the format of prompts")
        bank = self.bank()
        bank.save(target)
        return f"prompts of {', '.join(bank)} in {target}"


def _middle(picture: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def _condition(conditioner: nn.Module, message: Message) -> Message:
    prompt = conditioner(*(message.features[name] for name in ("row", "t", "present")))
    return replace(message, features={**message.features, "prompt": prompt})
