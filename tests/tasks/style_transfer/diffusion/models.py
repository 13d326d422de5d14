"""Small configs of the diffusion tasks, for tests."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
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
def kept() -> Path:
    """What tests would make alike is made once for all of a process: an autoencoder, and its latents by the picture."""
    folder = Path(tempfile.mkdtemp(prefix="latents-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def autoencoder_file() -> str:
    """Weights of an untrained TAESD."""
    path = kept() / "taesd.safetensors"
    torch.manual_seed(0)
    save_file(AutoencoderTiny().state_dict(), path)
    return str(path)


def task_of(config: str, room: Path, *overrides: str) -> tuple[Any, Any]:
    """Config and task of a smoke config."""
    return load(given(config, room, *overrides))


def given(config: str, room: Path, *overrides: str) -> list[str]:
    """The command line of a small run that needs nothing but what is installed."""
    return words(config, room, "--train.device", "cpu", *small(), *overrides)


def small() -> list[str]:
    file = autoencoder_file()
    torch.manual_seed(0)  # what a test draws afterwards does not hang on the tests before it
    return ["--model.autoencoder", file, "--data.cache", str(kept())]
