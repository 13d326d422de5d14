"""The small models' autoencoder: from a file, or trained once where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tasks.style_transfer.diffusion import autoencoder
from tasks.style_transfer.diffusion.autoencoder import tiny_autoencoder, train_autoencoder
from tests.tasks.style_transfer.diffusion.models import autoencoder_file


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There is no TAESD; training takes 2 steps, by a clock that goes by steps. The cache."""
    monkeypatch.setattr(autoencoder, "TAESD", tmp_path / "weights/taesd.safetensors")
    monkeypatch.setattr(autoencoder, "SECONDS", 2.0)
    monkeypatch.setattr(autoencoder, "time", SimpleNamespace(monotonic=map(float, itertools.count()).__next__))
    return tmp_path / "deep/cache"


def pictures(count: int = 2, side: int = 32) -> list[Tensor]:
    """Smooth ones."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return [*F.interpolate(coarse, (side, side + 8), mode="bilinear")]


def not_asked() -> NoReturn:
    raise AssertionError("pictures are for training alone")


def same(one: Any, other: Any) -> bool:
    state = one.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_a_file_is_read(tmp_path: Path) -> None:
    file = autoencoder_file()
    made = tiny_autoencoder(file, not_asked, tmp_path / "cache", 0)
    assert not made.training
    for name, tensor in load_file(file).items():
        assert torch.equal(made.state_dict()[name], tensor), name
    assert not (tmp_path / "cache").exists()


def test_taesd_is_taken_where_it_is(nowhere: Path, tmp_path: Path) -> None:
    """And a file that is named goes before it."""
    autoencoder.TAESD.parent.mkdir()
    torch.manual_seed(3)
    save_file(AutoencoderTiny().half().state_dict(), autoencoder.TAESD)
    made = tiny_autoencoder("", not_asked, nowhere, 0)
    assert not made.training
    for name, tensor in load_file(autoencoder.TAESD).items():
        assert torch.equal(made.state_dict()[name], tensor.float()), name
    assert not same(tiny_autoencoder(autoencoder_file(), not_asked, nowhere, 0), made)
    assert not nowhere.exists()


def test_without_taesd_one_is_trained_once(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_autoencoder("", pictures, nowhere, 0)
    assert not made.training
    (folder,) = nowhere.iterdir()
    said = " ".join(capsys.readouterr().out.split())
    assert f"model.autoencoder: there is no {autoencoder.TAESD}; training an autoencoder on 2 pictures for 2 s" in said
    assert f"{folder} will have it" in said
    for name, tensor in load_file(folder / "vae.safetensors").items():
        assert torch.equal(made.state_dict()[name], tensor), name
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda *_: not_asked())
    again = tiny_autoencoder("", pictures, nowhere, 0)
    assert not again.training
    assert same(made, again)
    assert not capsys.readouterr().out
    assert same(made, tiny_autoencoder("", not_asked, nowhere, 0)), "whatever the pictures"
    with pytest.raises(AssertionError, match="for training alone"):
        tiny_autoencoder("", pictures, nowhere, 1)
    assert [*nowhere.iterdir()] == [folder], "what failed is not kept"


def test_where_nothing_is_to_be_trained_one_that_is_missing_is_told(nowhere: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.autoencoder: \S+autoencoder_seed3, which training made .* not here"):
        tiny_autoencoder("", list, nowhere, 3)
    assert not nowhere.exists()


def test_it_hangs_on_the_seed_and_leaves_the_random_state(nowhere: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = tiny_autoencoder("", pictures, nowhere, 0)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(6)
    assert same(one, tiny_autoencoder("", pictures, tmp_path / "another", 0))
    assert not same(one, tiny_autoencoder("", pictures, nowhere, 1))
    assert len(list(nowhere.iterdir())) == 2


def test_what_was_trained_takes_and_gives_pictures(nowhere: Path) -> None:
    made = tiny_autoencoder("", pictures, nowhere, 0)
    with torch.no_grad():
        latents = made.encode(torch.rand(1, 3, 32, 48)).latents
        assert latents.shape == (1, 4, 4, 6)
        assert made.decode(latents).sample.shape == (1, 3, 32, 48)


def test_the_error_falls(nowhere: Path) -> None:
    """Of the pictures given back, in 100 steps."""
    torch.manual_seed(0)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    shown = torch.stack(pictures(4)) * 2 - 1

    @torch.no_grad()
    def error() -> float:
        return float(F.l1_loss(small.decode(small.encode(shown).latents).sample, shown))

    before = error()
    small.eval()
    last = train_autoencoder(small, pictures(4), 100, side=32)
    assert not small.training
    assert error() < 0.5 * before
    assert last == pytest.approx(error(), rel=0.5)


@pytest.mark.parametrize("sides", [(64, 72), (40, 100), (8, 9)])
def test_pictures_smaller_than_a_square_will_do(nowhere: Path, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    seen: list[torch.Size] = []
    vae = AutoencoderTiny()
    vae.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    train_autoencoder(vae, [torch.rand(3, *sides), torch.rand(3, 64, 64)], 2, side=64, batch=2)
    side = min(64, sides[0])
    assert seen == [(2, 3, side, side)] * len(seen)
    assert seen


def text(path: Path) -> None:
    path.write_text("no tensors\nat all")


def other(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def wider(path: Path) -> None:
    state = AutoencoderTiny().state_dict()
    save_file({**state, "encoder.layers.0.weight": torch.zeros(64, 4, 3, 3)}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, r"no such file: \S+file.safetensors$"),
        (text, r"\S+file.safetensors cannot be read: "),
        (other, r"\S+file.safetensors does not fit: '\S+' is nothing in the file, torch.Size\(.*\) in the model$"),
        (wider, r"\S+file.safetensors does not fit: 'encoder.layers.0.weight' is torch.Size\(\[64, 4, 3, 3\]\) in the"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=rf"^model.autoencoder: {said}") as error:
        tiny_autoencoder(str(tmp_path / "file.safetensors"), not_asked, tmp_path / "cache", 0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
