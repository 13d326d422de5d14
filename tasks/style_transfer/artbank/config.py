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
    """`ssam`: the paper's, a matrix through SSAM; `released`: the released code's, one vector through attention."""
    template: str = TEMPLATE
    """Text around the prompt, which takes the place of `*`; `{artist}` is the artist's name."""
    tokens: int = 1
    """Of `ssam`: vectors that take the place of `*`."""
    rows: int = 16
    """Of `ssam`: rows of an artist's matrix."""
    bank: str = ""
    """File of prompts to go on from: artists that learn start from what it has of them, the others stay as they are."""


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
