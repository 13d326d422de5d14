"""The pictures that an evaluation of prompts makes, and their figures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.utilities.seed import derive
from tasks.style_transfer.clip import CLIPFeatures
from tasks.style_transfer.diffusion.prompt_config import PicturesConfig
from tasks.style_transfer.images import write_image
from tasks.style_transfer.measures import as_bytes, load_fid, load_lpips
from tasks.style_transfer.sheet import contact_sheet
from tasks.style_transfer.structure import edge_ssim


class Repainting:
    """Repaints photographs in each artist's style: a contact sheet, and figures of structure and of likeness.

    - ``edge_ssim``: SSIM between the edges of the picture and those of the photograph.
    - ``lpips`` (Zhang et al. 2018), with ``pictures.lpips``: between picture and photograph; 0 for the photograph
    itself.
    - ``fid`` (Heusel et al. 2017), with ``pictures.fid_weights``: between all pictures and the artists' works. Its bias
      grows as the sets shrink.
    - ``clip``, with ``pictures.clip``: cosine between a picture's CLIP embedding and the mean of its artist's works.
    - ``seconds_a_picture``: mean time to paint a picture.

    Args:
        contents: photographs (3, H, W) from 0 to 1, all of one size.
        works: pictures by each artist, of the same form.

    Raises:
        ValueError: weights for LPIPS, FID or CLIP cannot be loaded.
    """

    def __init__(
        self, contents: Sequence[Tensor], works: Mapping[str, Sequence[Tensor]], settings: PicturesConfig, seed: int
    ) -> None:
        self.contents, self.works, self.settings, self.seed = contents, works, settings, seed
        self._lpips = load_lpips(settings.lpips, "pictures.lpips") if settings.lpips else None
        self._clip = CLIPFeatures(settings.clip, "pictures.clip") if settings.clip else None
        self._fid = None
        if settings.fid_weights:
            every = sum(len(each) for each in works.values())
            if len(contents) * len(works) < 2:
                raise ValueError("pictures.fid_weights: FID needs at least 2 pictures; see pictures.count")
            self._fid = load_fid(Path(settings.fid_weights), every, "pictures.fid_weights")

    @torch.no_grad()
    def __call__(self, pipeline: Any, folder: Path) -> dict[str, float]:
        """Repaint with ``pipeline``, write ``folder/sheet.png`` and return the figures."""
        made: dict[tuple[int, int], Tensor] = {}
        start = time.perf_counter()
        for column, artist in enumerate(self.works):
            for row, content in enumerate(self.contents):
                made[row, column] = self._repaint(pipeline, content, artist, row)
        seconds = (time.perf_counter() - start) / len(made)
        pictures, contents = torch.stack(list(made.values())), torch.stack([self.contents[row] for row, _ in made])
        found = {"edge_ssim": float(edge_ssim(pictures, contents).mean()), "seconds_a_picture": seconds}
        if self._lpips is not None:
            found["lpips"] = float(self._lpips(pictures, contents).mean())
        if self._fid is not None:
            self._fid.reset()
            self._fid.update(as_bytes(pictures), real=False)
            for work in (work for each in self.works.values() for work in each):
                self._fid.update(as_bytes(work)[None], real=True)
            found["fid"] = float(self._fid.compute())
        if self._clip is not None:
            found["clip"] = self._likeness(made)
        firsts = [each[0] for each in self.works.values()]
        write_image(folder / "sheet.png", contact_sheet(self.contents, firsts, made))
        return found

    def _repaint(self, pipeline: Any, content: Tensor, artist: str, number: int) -> Tensor:
        """Repaint one photograph; its noise depends only on the seed, the artist and the photograph's number."""
        settings = self.settings
        (picture,) = pipeline(
            content[None],
            artist,
            strength=settings.strength,
            guidance_scale=settings.guidance,
            num_inference_steps=settings.steps,
            inversion=settings.inversion,
            generator=torch.Generator().manual_seed(derive(self.seed, "picture", artist, number)),
            output_type="pt",
        ).images
        return torch.as_tensor(picture).float().cpu()

    def _likeness(self, made: Mapping[tuple[int, int], Tensor]) -> float:
        assert self._clip is not None
        cosines: list[float] = []
        for column, works in enumerate(self.works.values()):
            pictures = self._clip(torch.stack([picture for (_, place), picture in made.items() if place == column]))
            mean = F.normalize(self._clip(torch.stack(list(works)))).mean(0, keepdim=True)
            cosines += torch.cosine_similarity(pictures, mean).tolist()
        return math.fsum(cosines) / len(cosines)
