"""Which prompt each cross-attention layer of the denoiser reads; attention processors spare us a forked UNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tasks.style_transfer.lsast.prompts import LAYERS


class PartOfPrompt:
    """An attention processor that passes on one part of the prompts: tokens ``part`` * n to (``part`` + 1) * n.

    Every layer gets all three prompts, one after another, in ``encoder_hidden_states`` (N, 3 * n, width).
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
    """Have every cross-attention layer of a UNet or a ControlNet read its part of the prompts.

    In the paper's form the part depends on the resolution, in the same way on the way down and up: the innermost layers
    (our choice is to count the middle among them) read the first prompt, the layers between read the second and the
    outermost layers the third. In the released routing the encoder reads the first prompt, the middle the second and
    the decoder the third. (The released code runs encoder and middle without gradient, so that only the decoder's
    prompts learn; here every prompt that is read learns.)

    A network may be routed again; the earlier routing is replaced.

    Raises:
        ValueError: fewer than three resolutions have cross-attention, so that no layer would read some prompt.
    """
    depths = _depths(network)
    levels = sorted({depth for depth in depths.values() if depth >= 0}, reverse=True)  # from the innermost
    if form == "paper" and len(levels) < LAYERS:
        raise ValueError(
            f"prompt.form: the paper's form needs {LAYERS} resolutions with cross-attention, this denoiser has "
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


def _depths(network: Any) -> dict[str, int]:
    """How often the picture is halved before each cross-attention layer, by the layer's name; -1 in the middle."""
    levels, found = len(network.down_blocks), dict[str, int]()
    for name, _ in network.named_modules():
        if name.endswith("attn2"):
            way, *rest = name.split(".")
            number = int(rest[0]) if way != "mid_block" else 0
            found[name] = {"down_blocks": number, "up_blocks": levels - 1 - number, "mid_block": -1}[way]
    return found
