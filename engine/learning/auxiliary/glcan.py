"""GLCAN, the Global-Local Collaborative Auxiliary Network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn import functional as F

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, register
from engine.learning.auxiliary.thin import thin
from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.layout import as_map
from engine.network.message import Message
from engine.network.shapes import infer_shapes
from engine.task import Task


@register("glcan")
class GLCAN(AuxiliaryNetwork):
    """Local part from the backbone's own remaining stages, global part from the bank, the task's own head.

    A design rule rather than a network (arXiv 2406.00446), so that one rule serves every task::

        block's output -> reduce -> narrow -> first unit of each stage to come -> head -> prediction
                                                                                   ^
        bank: key features of the blocks before this one --------------------------+

    The paper says that the local part reuses units aligned with the remaining stages, thinned, with
    weights of their own, and that the bank is used as the backbone uses such features. Ours, since
    nothing public decides it: the depth rule, thinning by resolution rather than width, the timing of the
    bank, and (in the classification task's head) bringing joined features to one scale.

    Args (the options of ``local.auxiliary``):
        depth: units taken of each remaining stage, the first ones, with their strides, but no more than
            the block has itself: a small block gets a small auxiliary network. Remaining are the stages
            after the one that the block ends in; in the last stage, what is left of it.
        width: factor on the units' channels; 1 keeps the backbone's own. Below or above 1, a 1x1
            convolution leads in, and the units must consist of convolutions and normalisations.
        reduce: the local part works at 1/``reduce`` of the block's resolution. It divides time and
            memory by its square; only for layout ``NCHW`` (others keep their resolution).
        use_bank: whether there is a global part: the bank, and the maps of earlier blocks that travel in the
            message; for ablations.

    Known limitation: with ``reduce`` the maps that the local units see are smaller than the backbone's;
    where a side would fall below 2 it is kept.
    """

    def __init__(self, units: list[Unit], narrow: nn.Module, reduce: int, use_bank: bool) -> None:
        super().__init__()
        self.local_units = units
        self.local_modules = nn.ModuleList([unit.module for unit in units])
        self.narrow, self.reduce, self.uses_bank = narrow, reduce, use_bank
        self.head: nn.Module = nn.Identity()

    @classmethod
    def build(
        cls,
        chain: Chain,
        span: Span,
        bank: FeatureBank,
        task: Task,
        depth: int = 2,
        width: float = 1.0,
        reduce: int = 2,
        use_bank: bool = True,
    ) -> GLCAN:
        if depth < 0 or width <= 0 or reduce < 1:
            raise ValueError(
                f"local.auxiliary: glcan wants depth >= 0, width > 0, reduce >= 1, got {depth}, {width}, {reduce}"
            )
        output = chain.shapes()[span.stop - 1]
        units = [unit.copy() for unit in remaining_units(chain, span, depth)]
        narrow: nn.Module = nn.Identity()
        if width != 1 and units:
            units = [replace(unit, module=thin(unit.module, width, unit.name)) for unit in units]
            channels = as_map(output.x, chain.layout).shape[1]
            narrow = nn.Conv2d(channels, max(1, round(channels * width)), 1, bias=False)
        spatial = (
            chain.layout == "NCHW" and output.x.dim() == 4 and min(output.x.shape[-2:]) >= 2 * reduce and bool(units)
        )
        network = cls(units, narrow, reduce if spatial else 1, use_bank)
        try:
            features = infer_shapes(network.local, output, [network])
        except RuntimeError as error:
            names = ", ".join(unit.name for unit in units)
            raise ValueError(
                f"local.auxiliary: units {names} do not fit on block {span.index}'s output of shape "
                f"{tuple(output.x.shape)}; try reduce=1, width=1 or depth=0 ({error})"
            ) from error
        network.head = task.auxiliary_head(chain, *network.with_global_part(output, features, bank))
        return network

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(*self.with_global_part(message, self.local(message), bank))

    def with_global_part(self, message: Message, local: Message, bank: FeatureBank) -> tuple[Message, FeatureBank]:
        """What the head gets: the local part, and what earlier blocks gave if that is wanted."""
        if self.uses_bank:
            return local, bank
        made = {name: value for name, value in local.features.items() if name == "x" or name not in message.features}
        return replace(local, features=made), FeatureBank()

    def local(self, message: Message) -> Message:
        """The local part: what the backbone's remaining stages, thinned, make of the block's output."""
        if self.reduce > 1:
            message = message.with_x(F.avg_pool2d(message.x, self.reduce))
        message = message.with_x(self.narrow(message.x))
        for unit, module in zip(self.local_units, self.local_modules, strict=True):
            message = unit.forward(module, message)
        return message


def remaining_units(chain: Chain, span: Span, depth: int) -> list[Unit]:
    """The first ``depth`` units (or as many as the block has) of each remaining stage, in order."""
    staged = any(unit.stage for unit in chain.units)  # units of no stage (a neck) are then not the backbone's
    stage = chain.units[span.stop - 1].stage
    after = [unit for unit in chain.units[span.stop :] if unit.stage or not staged]
    later = [unit for unit in after if unit.stage != stage]
    chosen: list[Unit] = []
    for unit in later or after:
        if sum(unit.stage == other.stage for other in chosen) < min(depth, span.stop - span.start):
            chosen.append(unit)
    return chosen
