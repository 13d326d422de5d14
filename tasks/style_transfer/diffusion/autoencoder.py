"""The autoencoder of small models: TAESD from a file, or an autoencoder trained on the pictures for a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from engine.utilities.console import console, progress_bar
from engine.utilities.files import made_once
from engine.utilities.seed import seeded
from tasks.weights import load_weights

TAESD = Path("../shared/weights/taesd_fp16.safetensors")
SECONDS = 60.0


def tiny_autoencoder(file: str, pictures: Callable[[], Sequence[Tensor]], cache: Path, seed: int) -> AutoencoderTiny:
    """The Tiny AutoEncoder of Stable Diffusion (TAESD, Bohan 2023), in evaluation mode.

    Args:
        file: file with the weights. If empty, ``TAESD`` is used if it exists; otherwise an autoencoder is trained on
            ``pictures`` for a minute, once.
        pictures: returns pictures (3, H, W) from 0 to 1. It is called only to train, and returns none where training is
            not allowed.
        cache: folder for trained autoencoders; there is one for each seed, whatever the pictures.

    Raises:
        ValueError: the file does not exist or holds something else, or there is neither a file nor any picture.
    """
    if file or TAESD.is_file():
        vae = AutoencoderTiny()
        load_weights(vae, Path(file) if file else TAESD, key="model.autoencoder")
        return vae.eval()
    folder = cache / f"autoencoder_seed{seed}"
    return _trained([] if folder.is_dir() else list(pictures()), folder, seed)


def _trained(pictures: list[Tensor], folder: Path, seed: int) -> AutoencoderTiny:
    with seeded(seed, "autoencoder weights"):
        vae = AutoencoderTiny()
    if not folder.is_dir():
        if not pictures:
            raise ValueError(
                f"model.autoencoder: {folder}, which training made where there is no {TAESD}, is not here; give its "
                "vae.safetensors, or data.cache the folder that it is in"
            )
        console.print(
            f"model.autoencoder: there is no {TAESD}; training an autoencoder on {len(pictures)} pictures for "
            f"{SECONDS:.0f} s, which blurs more than TAESD does; {folder} will have it"
        )
        with made_once(folder) as made, seeded(seed, "autoencoder"):
            train_autoencoder(vae, pictures, SECONDS)
            save_file(vae.state_dict(), made / "vae.safetensors")
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.eval()


def train_autoencoder(vae: Any, pictures: Sequence[Tensor], seconds: float, side: int = 64, batch: int = 4) -> float:
    """Train with Adam on the mean absolute error of squares cropped from ``pictures``; return the mean of the last
    errors.

    A second term keeps latents near unit size. (With the squared error alone, a small network paints everything in one
    colour for a long time.) The number of steps depends on the machine, and so does the result; that is why the result
    is kept in a file.
    """
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    start, errors = time.monotonic(), list[float]()
    least = min(side, min(min(picture.shape[1:]) for picture in pictures) // 8 * 8)
    vae.train()
    with progress_bar() as bar:
        shown = bar.add_task("autoencoder", total=seconds)
        while (spent := time.monotonic() - start) < seconds or not errors:
            squares = []
            for number in torch.randint(len(pictures), (batch,)).tolist():
                height, width = pictures[number].shape[1:]
                top = int(torch.randint(height - least + 1, ()))
                left = int(torch.randint(width - least + 1, ()))
                squares.append(pictures[number][:, top : top + least, left : left + least])
            given = torch.stack(squares) * 2 - 1
            latents = vae.encode(given).latents
            error = F.l1_loss(vae.decode(latents).sample, given)
            (error + 0.01 * (latents.square().mean() - 1).abs()).backward()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * max(0.05, 1 - spent / seconds)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            errors.append(float(error.detach()))
            bar.update(shown, completed=min(spent, seconds))
    vae.eval()
    return sum(errors[-10:]) / len(errors[-10:])
