"""Damaged images, checkpoints and files of weights: refused in one line, or trained on; nothing on disk is lost."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.classification.resnet import resnet_chain
from tests.fuzz.mistakes import damaged, fuzz, put, train
from tests.tools.commands import SMOKE, call
from tests.toy import assert_equal

IMAGES = {"train": 4, "test": 2}


def images(room: Path) -> list[Path]:
    """Two classes of flat colours, as a user keeps images in folders."""
    files = []
    for split, count in IMAGES.items():
        for number, name in enumerate(("ant", "bee")):
            (room / "set" / split / name).mkdir(parents=True)
            for index in range(count):
                files.append(room / "set" / split / name / f"{index}.png")
                Image.new("RGB", (12, 10), (80 * number, 20 * index, 40)).save(files[-1])
    return files


FOLDER = ["--config", SMOKE[1], "--data.name", "folder", "--data.root", "set", "--data.size", "8", "--data.batch", "4"]
FOLDER += ["--data.subset", "0", "--model.name", "resnet8", "--local.blocks", "2", "--train.steps", "2"]
MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]


def saved(mode: str, suffix: str, size: tuple[int, int]) -> bytes:
    """An image file of a kind; empty where Pillow has no such file."""
    content = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError):
        Image.new(mode, size).save(content, suffix)
    return content.getvalue()


@fuzz(
    which=st.integers(0, 11),
    mistake=st.sampled_from(["cut", "flip", "kind", "remove", "folder", "dangling", "loop", "rename", "beside"]),
    at=st.floats(0, 1),
    mode=st.sampled_from(MODES),
    suffix=st.sampled_from(["png", "jpeg", "tiff", "bmp", "gif", "webp", "ppm"]),
    size=st.sampled_from([(1, 1), (12, 10), (1, 300), (7, 5000)]),
    name=st.sampled_from(
        [".DS_Store", "._0.png", "Thumbs.db", "note.txt", "0.PNG", "x.jpeg", "a b.png", "é.png", "0.png.tmp"]
    ),
)
def test_a_damaged_image(
    rooms: Any, which: int, mistake: str, at: float, mode: str, suffix: str, size: tuple[int, int], name: str
) -> None:
    room = rooms()
    file = images(room)[which]
    content = file.read_bytes()
    if mistake in ("cut", "flip"):
        file.write_bytes(damaged(content, mistake, at))
    elif mistake == "kind":
        file.write_bytes(saved(mode, suffix, size))
    elif mistake == "beside":
        (file.parent / name).write_bytes(damaged(content, "cut", at))
    else:
        file.unlink()
        if mistake == "folder":
            file.mkdir()
        elif mistake == "dangling":
            file.symlink_to("nowhere.png")
        elif mistake == "loop":
            file.symlink_to(file)
        elif mistake == "rename":
            (file.parent / name).write_bytes(content)
    # An image more or less changes the size of the last batch.
    named = [str(file.relative_to(room)), str(file.parent.relative_to(room) / name), "data.batch"]
    train(room, *FOLDER, named=named)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of three steps with its last two checkpoints, and the weights that five steps give."""
    room = tmp_path_factory.mktemp("finished")
    assert call(*SAVED, "--train.steps", "3", cwd=room).returncode == 0
    further = tmp_path_factory.mktemp("further")
    shutil.copytree(room / "runs", further / "runs")
    assert call(*SAVED, *FURTHER, cwd=further).returncode == 0
    return room, weights(further)


SAVED = [*SMOKE, "--output.root", "runs", "--train.save_every", "1", "--train.epochs", "2"]
FURTHER = ["--train.steps", "5", "--train.resume", "auto"]


def weights(room: Path) -> dict[str, Tensor]:
    files = sorted((room / "runs/smoke/checkpoints/step_5").glob("*.safetensors"))
    assert files
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@fuzz(
    which=st.integers(0, 50),
    newest=st.booleans(),
    mistake=st.sampled_from(["cut", "flip", "empty", "remove", "swap", "folder", "json"]),
    at=st.floats(0, 1),
    value=st.sampled_from([None, -5, 10**9, 0.5, "x", [], {}]),
)
def test_a_damaged_checkpoint(
    rooms: Any, finished: Any, which: int, newest: bool, mistake: str, at: float, value: Any
) -> None:
    """The bits of an undamaged run, from the checkpoint before if need be; or one line, and every file as it was."""
    base, expected = finished
    room = rooms()
    shutil.copytree(base / "runs", room / "runs")
    checkpoints = sorted((room / "runs/smoke/checkpoints").glob("step_*"))
    files = sorted(file for file in checkpoints[-1 if newest else 0].rglob("*") if file.is_file())
    file = files[which % len(files)]
    content = file.read_bytes()
    if mistake in ("cut", "flip"):
        file.write_bytes(damaged(content, mistake, at))
    elif mistake == "empty":
        file.write_bytes(b"")
    elif mistake == "swap":
        file.write_bytes(files[(which + 1) % len(files)].read_bytes())
    elif mistake == "json":
        file = next(file for file in files if file.name == "state.json")
        state = json.loads(file.read_text())
        keys = [(key,) for key in state] + [(k, i) for k, v in state.items() if isinstance(v, dict) for i in v]
        put(state, keys[which % len(keys)], value)
        file.write_text(json.dumps(state))
    else:
        file.unlink()
        if mistake == "folder":
            file.mkdir()
    before = contents(room / "runs/smoke/checkpoints")
    if train(room, *SAVED, *FURTHER, named=[file.parent.name]).returncode == 0:
        assert_equal(weights(room), expected)
    else:
        assert contents(room / "runs/smoke/checkpoints") == before


@fuzz(
    mistake=st.sampled_from(["cut", "flip", "drop", "add", "shape", "type", "value", "nest", "list", "suffix", "text"]),
    which=st.integers(0, 200),
    at=st.floats(0, 1),
    torch_file=st.booleans(),
)
def test_a_wrong_file_of_weights(rooms: Any, mistake: str, which: int, at: float, torch_file: bool) -> None:
    room, model = rooms(), resnet_chain(8, 10, 16).model.state_dict()
    state: Any = {name: tensor.clone() for name, tensor in model.items()}
    name = sorted(state)[which % len(state)]
    if mistake == "drop":
        del state[name]
    elif mistake == "add":
        state["more"] = torch.zeros(3)
    elif mistake == "shape":
        state[name] = torch.zeros(*state[name].shape, 2)
    elif mistake == "type":
        state[name] = state[name].to([torch.int64, torch.float16, torch.bool, torch.complex64][which % 4])
    elif mistake == "value":
        state[name] = torch.full_like(state[name], [-1, 2**31][which % 2])
        if state[name].is_floating_point():
            state[name].fill_([float("nan"), float("inf")][which % 2])
    file = room / f"weights.{'pth' if torch_file != (mistake == 'suffix') else 'safetensors'}"
    if torch_file:
        torch.save({"model": {"net": state}} if mistake == "nest" else [state] if mistake == "list" else state, file)
    else:
        save_file(state, file)
    content = file.read_bytes()
    if mistake in ("cut", "flip"):
        file.write_bytes(damaged(content, mistake, at))
    elif mistake == "text":
        file.write_text("weights")
    words = [*SMOKE, "--output.root", "runs", "--train.steps", "1", "--model.weights", file.name]
    train(room, *words, named=[f"model.weights: {file.name}", f"model.weights: no such file: {file.name}"])
