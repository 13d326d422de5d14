"""The ControlNet of LSAST's pipeline: load one and check it against the denoiser, or stand in for a missing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel

from tasks.style_transfer.diffusion.checkpoint import variant_in
from tasks.weights import why_unreadable


class NoControl(ControlNetModel):
    """Stands in where a pipeline requires a ControlNet and there is none: it computes nothing and adds nothing.

    Pictures are bit-identical to those with a fresh ``ControlNetModel.from_unet``, whose last convolutions are zero.
    """

    def __init__(self) -> None:
        super().__init__(
            down_block_types=("DownBlock2D",),
            mid_block_type="UNetMidBlock2D",
            block_out_channels=(1,),
            layers_per_block=1,
            norm_num_groups=1,
            conditioning_embedding_out_channels=(1,),
        )

    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None


def load_controlnet(name: str | Path) -> ControlNetModel:
    """The ControlNet of a folder in diffusers' layout, or of a name on the hub.

    Raises:
        ValueError: it does not exist, or it is damaged.
    """
    try:
        return ControlNetModel.from_pretrained(str(name), variant=variant_in("controlnet", Path(name)))
    except Exception as error:
        cause = f"{type(error).__name__}: {why_unreadable(error)}"
        raise ValueError(f"controlnet: {name} cannot be read: {cause}") from error


def check_controlnet(controlnet: Any, unet: UNet2DConditionModel) -> None:
    """Check that a ControlNet fits a denoiser.

    Raises:
        ValueError: it is not a ControlNet, or its widths differ from the denoiser's.
    """
    if not isinstance(controlnet, ControlNetModel):
        raise ValueError(f"controlnet: {type(controlnet).__name__} is not a ControlNetModel; give a single one")
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        own, wanted = (_plain(network.config[key]) for network in (controlnet, unet))
        if own != wanted:
            raise ValueError(f"controlnet: has {key} {own}, the denoiser {wanted}; take one made for this checkpoint")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
