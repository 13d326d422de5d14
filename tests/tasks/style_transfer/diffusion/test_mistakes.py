"""Mistakes and accidents of people who train prompts and denoisers, as they see them: one line, before training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.diffusion import data
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.images import write_image
from tests.tasks.style_transfer import pipelines as p
from tests.tasks.style_transfer.diffusion.models import ARTBANK, DENOISER, LSAST, given
from tests.tasks.style_transfer.painters import noise
from tests.tools.commands import ROOT, assert_refused, call


def train(room: Path, *overrides: str, config: str = ARTBANK) -> subprocess.CompletedProcess[str]:
    return call(*given(str(ROOT / config), room, *overrides), cwd=room)


def pictures(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for number in range(count):
        write_image(folder / f"{number}.png", noise(20 + number, 30, number))
    return folder


def test_ctrl_c_while_latents_are_encoded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal itself comes in the middle of the second picture."""
    seen: list[Path] = []

    def read(path: Path, shorter: int) -> Any:
        seen.append(path)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return data_read(path, shorter)

    data_read = data.read_resized
    monkeypatch.setattr(data, "read_resized", read)
    words = ["--data.cache", str(tmp_path / "cache"), "--pictures.count", "0"]
    done = train(tmp_path, *words)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert len(seen) == 2
    assert list((tmp_path / "cache").iterdir()) == [], "neither latents nor parts of them"
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = train(tmp_path, "--data.cache", str(tmp_path / "file/cache"))
    assert_refused(done, f"{tmp_path}/file/cache/latents_")
    assert "cannot be written: Not a directory" in done.stderr


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def with_long_texts(folder: Path) -> None:
    (folder / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def that_predicts_flow(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "flow_prediction"}))


def without_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


@pytest.mark.parametrize("config", [ARTBANK, LSAST, DENOISER], ids=["artbank", "lsast", "denoiser"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_tokenizer, "sd has no tokenizer/ with tokenizer.json, or vocab.json and merges.txt; copy that of the"),
        (with_long_texts, "tokens, its text encoder reads 32; set model_max_length in tokenizer/tokenizer_config.json"),
        (that_predicts_flow, "sd predicts 'flow_prediction', as its scheduler says; known: epsilon, v_prediction, sam"),
        (without_scheduler, "scheduler of"),
    ],
)
def test_checkpoints_that_lack_something(
    checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str, config: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "sd")
    spoil(folder)
    assert_refused(train(tmp_path, "--model.pretrained", str(folder), config=config), said)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=said) as caught:
        ArtBankPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_that_predicts_velocity_trains_and_paints(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "sd")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    done = train(tmp_path, "--model.pretrained", str(folder))
    assert done.returncode == 0, done.stderr
    assert Base(str(folder)).sampler().config.prediction_type == "v_prediction"
    p.paint(p.pipeline("artbank", folder, "monet"))


@pytest.mark.slow
def test_what_an_artists_folder_may_hold(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    works = pictures(tmp_path / "works")
    both = f"{{monet: [{works}], cezanne: [{tmp_path / 'empty'}]}}"
    said = f"error: data.collections: no image in {tmp_path / 'empty'} and its subfolders; images end in .png"
    done = train(tmp_path, "--data.collections", both)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    one = ("--data.collections", f"{{monet: [{works}]}}", "--data.cache", str(tmp_path / "cache"))
    done = train(tmp_path, *one)
    assert done.returncode == 0, f"pictures smaller than the square are enlarged: {done.stderr}"
    whole = (works / "3.png").read_bytes()
    shutil.rmtree(tmp_path / "run")
    (works / "3.png").write_bytes(whole[: len(whole) // 2])
    assert_refused(train(tmp_path, *one), "works/3.png: cannot be read")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob(".making-*"))


@pytest.mark.slow
def test_a_run_is_exported_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path, "--pictures.count", "0").returncode == 0
    (tmp_path / "file").touch()
    words = ["--run", str(tmp_path / "run"), "--out"]
    done = call(*words, "file/bank.safetensors", tool="export", cwd=tmp_path)
    assert_refused(done, "file/bank.safetensors: cannot be written: ")
    (tmp_path / "folder.safetensors").mkdir()
    done = call(*words, "folder.safetensors", tool="export", cwd=tmp_path)
    assert_refused(done, "folder.safetensors: cannot be written: Is a directory")
    assert not list(tmp_path.glob(".*writing*"))
    for _ in range(2):  # what is there is replaced
        assert call(*words, "bank.safetensors", tool="export", cwd=tmp_path).returncode == 0
    content = pictures(tmp_path / "content", 1)
    more = ("--run", str(tmp_path / "run"), "--content", str(content), "--out", "out", "--style")
    done = call(*more, "texture", tool="stylize", cwd=tmp_path)
    assert_refused(done, "run knows, did you mean 'textures'?; they are: photographs, textures")
    # Whoever runs the tests may write anywhere.
    access = os.access
    monkeypatch.setattr("os.access", lambda place, mode: place != Path() and access(place, mode))
    done = call(*words, "other.safetensors", tool="export", cwd=tmp_path)
    assert_refused(done, "other.safetensors: cannot be written: Permission denied")
