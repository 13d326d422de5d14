"""The config of a run that learns LSAST's prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.diffusion.prompt_config import PromptTaskConfig
from tasks.style_transfer.diffusion.text import check_template
from tasks.style_transfer.lsast.prompts import TEMPLATE


@dataclass
class PromptConfig:
    """The prompts."""

    form: Literal["paper", "released"] = "paper"
    """`paper`: layers read prompts by resolution; `released`: the released code's routing, by encoder, middle and
    decoder, which leaves most prompts unread."""
    template: str = TEMPLATE
    """Text around the prompt, which takes the place of `*`; `{artist}` is the artist's name."""
    stages: int = 10
    """Equal parts of the noise's course, each with three prompts of its own."""
    bank: str = ""
    """File of prompts to go on from: artists that learn start from what it has of them, the others stay as they are."""


@dataclass
class LSASTConfig(PromptTaskConfig):
    """Learn artists' styles as prompts by stage and layer of a frozen Stable Diffusion (arXiv 2404.11474)."""

    prompt: PromptConfig = field(default_factory=PromptConfig)
    controlnet: str = ""
    """Folder or hub name of a ControlNet for canny edges, which holds a photograph's structure; empty: none."""

    def check(self) -> None:
        super().check()
        at_least(("prompt.stages", self.prompt.stages, 1))
        check_template("prompt.template", self.prompt.template)
