"""Small configs of the diffusion tasks, for tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from tasks import load
from tests.runs import words

TASKS = Path("tasks/style_transfer")
DENOISER, ARTBANK, LSAST = (str(TASKS / name / "configs/smoke.yaml") for name in ("denoiser", "artbank", "lsast"))


@functools.cache
def autoencoder_file(room: Path) -> str:
    """Weights of an untrained TAESD."""
    path = room / "taesd.safetensors"
    torch.manual_seed(0)
    save_file(AutoencoderTiny().state_dict(), path)
    return str(path)


def task_of(config: str, room: Path, *overrides: str) -> tuple[Any, Any]:
    """Config and task of a smoke config, whose latents are kept in ``room``."""
    return load(given(config, room, *overrides))


def given(config: str, room: Path, *overrides: str) -> list[str]:
    """The command line of a small run that needs nothing but what is installed."""
    return words(config, room, "--train.device", "cpu", *small(room), *overrides)


def small(room: Path) -> list[str]:
    return ["--model.autoencoder", autoencoder_file(room), "--data.cache", str(room)]
