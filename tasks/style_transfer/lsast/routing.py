"""Which prompt each of the denoiser's cross-attention layers reads: attention processors, no forked UNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tasks.style_transfer.lsast.prompts import LAYERS


class PartOfPrompt:
    """An attention processor that hands another one its part of the prompts: tokens ``part`` * n to (``part`` + 1) * n.

    The prompts come one after another in ``encoder_hidden_states`` (N, 3 * n, width), as every layer gets them.
    """

    def __init__(self, processor: Any, part: int) -> None:
        self.processor, self.part = processor, part

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *rest: Any, **more: Any
    ) -> Any:
        length = encoder_hidden_states.shape[1] // LAYERS
        own = encoder_hidden_states[:, self.part * length : (self.part + 1) * length]
        return self.processor(attention, hidden_states, own, *rest, **more)


def route(network: nn.Module, form: str) -> None:
    """Give every cross-attention layer of a UNet or a ControlNet its part of the prompts.

    In the paper's form by resolution, the same on the way down and up: the innermost layers (the middle's among them,
    which is ours) read the first prompt, those between the second, the outermost the third. In the released routing the
    encoder reads the first, the middle the second and the decoder the third. (The released code runs encoder and middle
    without gradient, so that the decoder's prompts alone learn; here all that are read do.)

    A network that has been routed is routed anew.

    Raises:
        ValueError: fewer than three resolutions with cross-attention, so that a prompt would have no layer.
    """
    depths = _depths(network)
    levels = sorted({depth for depth in depths.values() if depth >= 0}, reverse=True)  # from the innermost
    if form == "paper" and len(levels) < LAYERS:
        raise ValueError(
            f"prompt.form: the paper's wants {LAYERS} resolutions with cross-attention, this denoiser has "
            f"{len(levels)}; take `released`"
        )
    for name, module in network.named_modules():
        if not name.endswith("attn2"):
            continue
        if form == "paper":
            depth = depths[name]
            part = 0 if depth < 0 else levels.index(depth) * LAYERS // len(levels)
        else:
            part = 0 if name.startswith("down") else 1 if name.startswith("mid") else 2
        plain = module.processor
        while isinstance(plain, PartOfPrompt):
            plain = plain.processor
        module.set_processor(PartOfPrompt(plain, part))


def _depths(network: nn.Module) -> dict[str, int]:
    """Of each cross-attention layer how often the picture was halved before it; -1 in the middle."""
    levels, found = len(network.down_blocks), dict[str, int]()
    for name, _ in network.named_modules():
        if name.endswith("attn2"):
            way, *rest = name.split(".")
            number = int(rest[0]) if way != "mid_block" else 0
            found[name] = {"down_blocks": number, "up_blocks": levels - 1 - number, "mid_block": -1}[way]
    return found
