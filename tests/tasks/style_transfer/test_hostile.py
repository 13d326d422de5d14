"""Files that would run code if they were unpickled: wherever weights are read, none does, and nobody is advised to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.clip import CLIPFeatures
from tasks.style_transfer.diffusion.autoencoder import tiny_autoencoder
from tasks.style_transfer.diffusion.bank import load_bank
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.lsast.control import load_controlnet
from tasks.style_transfer.measures import load_fid
from tasks.weights import read_weights


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def part(name: str, file: str) -> Callable[[Path, Path], Any]:
    """Read a checkpoint whose part has such a file instead of its own."""

    def read(bad: Path, checkpoint: Path) -> None:
        folder = shutil.copytree(checkpoint, bad.parent / "sd")
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
        shutil.copy(bad, folder / name / file)
        try:
            getattr(Base(str(folder)), name)()
        except ValueError as error:
            assert_silent(error)
        ArtBankPipeline.from_pretrained(folder)

    return read


def clip(bad: Path, _: Path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**small)).config.save_pretrained(bad.parent / "clip")
    shutil.copy(bad, bad.parent / "clip/pytorch_model.bin")
    CLIPFeatures(str(bad.parent / "clip"))


def controlnet(bad: Path, checkpoint: Path) -> None:
    from diffusers import ControlNetModel

    folder = bad.parent / "control"
    ControlNetModel.from_unet(Base("tiny").unet()).save_config(folder)
    shutil.copy(bad, folder / "diffusion_pytorch_model.bin")
    load_controlnet(folder)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "model.weights": lambda bad, _: read_weights(bad, "model.weights"),
    "model.autoencoder": lambda bad, _: tiny_autoencoder(str(bad), list, bad.parent, 0),
    "pictures.fid_weights": lambda bad, _: load_fid(bad, 2),
    "prompts": lambda bad, _: load_bank(bad, None, "artbank"),
    "unet": part("unet", "diffusion_pytorch_model.bin"),
    "text_encoder": part("text_encoder", "pytorch_model.bin"),
    "clip": clip,
    "controlnet": controlnet,
}


def assert_silent(error: BaseException) -> None:
    said = str(error)
    assert "\n" not in said
    assert "weights_only" not in said
    assert "load failed" not in said
    assert "you have two options" not in said


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_run_and_no_bad_advice_is_given(checkpoint: Path, tmp_path: Path, name: str) -> None:
    bad, trace = tmp_path / "bad.pth", tmp_path / "trace"
    torch.save({"state_dict": Hostile(trace)}, bad)
    with pytest.raises(ValueError, match="cannot be|does not hold|can be loaded") as caught:
        READERS[name](bad, checkpoint)
    assert_silent(caught.value)
    assert not trace.exists()
    torch.load(bad, weights_only=False)
    assert trace.is_dir(), "the file is harmful indeed"


def test_a_program_is_called_one(tmp_path: Path) -> None:
    """torch's message of TorchScript gives the same advice by another kind of error."""
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(tmp_path / "program.pt"))
    with pytest.raises(ValueError, match=r"program.pt cannot be read: it holds a TorchScript program; save the") as e:
        read_weights(tmp_path / "program.pt", "model.weights")
    assert_silent(e.value)
