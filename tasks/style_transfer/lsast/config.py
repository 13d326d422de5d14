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
    """`paper`: each layer reads the prompt for its resolution; `released`: the routing of the released code by encoder,
    middle and decoder, which leaves most prompts unread."""
    template: str = TEMPLATE
    """Text around the prompt. The prompt replaces `*`, and the artist's name replaces `{artist}`."""
    stages: int = 10
    """Number of equal parts that the timesteps are divided into; each part has three prompts of its own."""
    bank: str = ""
    """File of prompts to continue from. Artists that are trained start from their prompts in it, if it has any; all
    other prompts in it stay as they are."""


@dataclass
class LSASTConfig(PromptTaskConfig):
    """Learn artists' styles as prompts by stage and layer of a frozen Stable Diffusion (arXiv 2404.11474)."""

    prompt: PromptConfig = field(default_factory=PromptConfig)
    controlnet: str = ""
    """Folder or hub name of a ControlNet for Canny edges, which preserves a photograph's structure; empty uses none."""

    def check(self) -> None:
        super().check()
        at_least(("prompt.stages", self.prompt.stages, 1))
        check_template("prompt.template", self.prompt.template)
