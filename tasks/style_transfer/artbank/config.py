"""The config of a run that learns ArtBank's prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.artbank.prompts import TEMPLATE
from tasks.style_transfer.diffusion.prompt_config import PromptTaskConfig
from tasks.style_transfer.diffusion.text import check_template


@dataclass
class PromptConfig:
    """The prompts."""

    form: Literal["ssam", "released"] = "ssam"
    """`ssam`: as in the paper, a matrix that passes through SSAM; `released`: as in the released code, one vector that
    passes through attention."""
    template: str = TEMPLATE
    """Text around the prompt. The prompt replaces `*`, and the artist's name replaces `{artist}`."""
    tokens: int = 1
    """For `ssam`: number of vectors that replace `*`."""
    rows: int = 16
    """For `ssam`: rows of an artist's matrix."""
    bank: str = ""
    """File of prompts to continue from. Artists that are trained start from their prompts in it, if it has any; all
    other prompts in it stay as they are."""


@dataclass
class ArtBankConfig(PromptTaskConfig):
    """Learn artists' styles as prompts of a frozen Stable Diffusion (arXiv 2312.06135)."""

    prompt: PromptConfig = field(default_factory=PromptConfig)

    def check(self) -> None:
        super().check()
        prompt = self.prompt
        at_least(("prompt.tokens", prompt.tokens, 1), ("prompt.rows", prompt.rows, 1))
        check_template("prompt.template", prompt.template)
        if prompt.form == "released" and prompt.tokens != 1:
            raise ValueError(f"prompt.tokens: the released form has a single vector, not {prompt.tokens}; set it to 1")
        if prompt.rows % prompt.tokens:
            raise ValueError(f"prompt.rows: {prompt.rows} cannot be pooled to {prompt.tokens} tokens; take a multiple")
