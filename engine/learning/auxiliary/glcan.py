"""GLCAN, the Global-Local Collaborative Auxiliary Network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, register
from engine.learning.auxiliary.thin import thin
from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.layout import as_map, is_nchw
from engine.network.message import Message
from engine.network.shapes import changes, infer_shapes, needs_values
from engine.task import Task
from engine.utilities.text import described, one_line, place


@register("glcan")
class GLCAN(AuxiliaryNetwork):
    """Local part from the backbone's remaining stages, global part from the feature bank, and the task's own head.

    GLCAN (Feiyu Zhu et al., arXiv 2406.00446; later versions call the method Memory-augmented Auxiliary Network and
    FBA) is a design rule for auxiliary networks, so that one rule serves every task::

        block's output -> reduce -> narrow -> first units of each stage to come -> head -> prediction
                                                                                    ^
        bank: key features of the blocks before this one ---------------------------+

    Where each part comes from:

    - *Abstract*: GLCAN is "a macroscopic design approach for auxiliary networks".
    - *Public reviews* of the submitted paper: the local part is "lightweight", "reusing aligned backbone blocks and the
      original task head"; in classification the bank stores "GAP/FC activations".
    - *Our inference*: the reused blocks are those of the remaining stages, thinned, with weights of their own.
    - *Our own choice*, since nothing public decides it: the rules for depth and width, thinning by resolution, the
      timing of the bank (detached features of this iteration), and how a head joins them.

    The body of the paper could not be read, so none of its figures is reproduced here.

    Args (the options of ``local.auxiliary``):
        depth: number of units taken from the start of each remaining stage, with their strides, but no more than the
            block itself has, so that a small block gets a small auxiliary network. The remaining stages are those after
            the stage in which the block ends; for a block that ends in the last stage, the rest of that stage.
        width: factor on the channels of these units; 1 keeps the backbone's width. Any other value puts a 1x1
            convolution in front. A unit that cannot be thinned, because it contains more than convolutions and
            normalisations, keeps the backbone's width, and the log says so.
        reduce: the local part works at 1/``reduce`` of the block's resolution in each direction, which divides its time
            and memory by ``reduce`` squared. Layouts other than ``NCHW`` keep their resolution.
        use_bank: whether there is a global part, that is, the bank and the maps of earlier blocks that travel in the
            message. Turn it off for ablations.

    Known limitation: with ``reduce``, the local units see smaller maps than in the backbone. If a side would fall below
    2, the resolution is kept.
    """

    def __init__(self, units: list[Unit], narrow: nn.Module, reduce: int, use_bank: bool) -> None:
        super().__init__()
        self.local_units = units
        self.local_modules = nn.ModuleList([unit.module for unit in units])
        self.narrow, self.reduce, self.uses_bank = narrow, reduce, use_bank
        self.head: nn.Module = nn.Identity()  # ``build`` replaces it, once the local part's output shape is known
        self.copied: frozenset[str] = frozenset()
        """The features that the local part changes in place. It works on copies, since the next block gets them too."""

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
        """Build the network from copies of the remaining units (see the class).

        Raises:
            ValueError: an option is out of range, or the units do not fit on the block's output; the message names
                them.
        """
        if depth < 0 or width <= 0 or reduce < 1:
            raise ValueError(
                f"local.auxiliary: glcan needs depth >= 0, width > 0, reduce >= 1, got {depth}, {width}, {reduce}"
            )
        output = chain.shapes()[span.stop - 1]
        units = [unit.copy() for unit in remaining_units(chain, span, depth)]
        spatial = is_nchw(output.x, chain.layout) and min(output.x.shape[-2:]) >= 2 * reduce and bool(units)
        reduce = reduce if spatial else 1
        narrow: nn.Module = nn.Identity()
        remarks: tuple[str, ...] = ()
        try:
            if width != 1 and units:
                units, narrow, remarks = thinned_units(chain, units, output, width, reduce)
            network = cls(units, narrow, reduce, use_bank)
            network.remarks = remarks
            features, network.copied = _tried(network.local, output, [network])
        except UnfitError as error:
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
        """The head's input: the local part, together with the features of earlier blocks if there is a global part."""
        if self.uses_bank:
            return local, bank
        # Maps that earlier blocks put into the message are global features too: keep only what the local units made.
        made = {name: value for name, value in local.features.items() if name == "x" or name not in message.features}
        return replace(local, features=made), FeatureBank()

    def local(self, message: Message) -> Message:
        """The local part: run the block's output through the thinned units of the remaining stages."""
        if self.copied:
            copies = {name: pytree.tree_map_only(Tensor, Tensor.clone, message.features[name]) for name in self.copied}
            message = replace(message, features={**message.features, **copies})
        if self.reduce > 1:
            message = message.with_x(F.avg_pool2d(message.x, self.reduce))
        message = message.with_x(self.narrow(message.x))
        for unit, module in zip(self.local_units, self.local_modules, strict=True):
            message = unit.forward(module, message)
        return message


def thinned_units(
    chain: Chain, units: Sequence[Unit], output: Message, width: float, reduce: int
) -> tuple[list[Unit], nn.Module, tuple[str, ...]]:
    """Thin ``units``, each for the output of the one before; those that cannot be thinned keep their width.

    Whether a unit works when it is thinned shows when it runs (on fake tensors): a layer may be thinned, and the module
    around it still split its channels into as many as before. Where the width changes between two units, a 1x1
    convolution stands before the second.

    Returns:
        The units, the convolution in front of them, and a remark on each unit that keeps its width.

    Raises:
        UnfitError: a unit does not work even at its full width.
    """
    message = (
        infer_shapes(lambda given: given.with_x(F.avg_pool2d(given.x, reduce)), output, []) if reduce > 1 else output
    )
    width_before = as_map(output.x, chain.layout).shape[1]  # in the backbone
    fitted: list[tuple[nn.Module, Unit]] = []
    thinned, remarks = dict[str, Unit](), dict[str, str]()

    def fit(unit: Unit, channels: int) -> Message:
        actual = as_map(message.x, chain.layout).shape[1]
        adapter = nn.Identity() if actual == channels else nn.Conv2d(actual, channels, 1, bias=False)
        after, _ = _tried(lambda given: unit(given.with_x(adapter(given.x))), message, [adapter, unit.module])
        fitted.append((adapter, unit))
        return after

    def keep_wide(unit: Unit, why: ValueError) -> None:
        remarks[unit.name] = (
            f"local.auxiliary: width={width} cannot thin unit {unit.name!r}, which stays at full width in GLCAN's "
            f"local part: {one_line(why, 200)}"
        )

    # All units before any convolution between them, which keeps the order of random draws independent of the latter.
    for unit in units:
        try:
            thinned[unit.name] = replace(unit, module=thin(unit.module, width))
        except ValueError as error:
            keep_wide(unit, error)
    for unit in units:
        if unit.name in thinned:
            try:
                message = fit(thinned[unit.name], max(1, round(width_before * width)))
            except UnfitError as error:
                keep_wide(unit, error)
        if unit.name in remarks:
            message = fit(chain.units[chain.index(unit.name)].copy(), width_before)
        width_before = as_map(chain.shapes()[chain.index(unit.name)].x, chain.layout).shape[1]
    (narrow, first), *others = fitted
    return [first, *(_behind(adapter, unit) for adapter, unit in others)], narrow, tuple(remarks.values())


class UnfitError(ValueError):
    """Units fail on what they are given in a local part."""


def _tried(
    forward: Callable[[Message], Message], message: Message, modules: Sequence[nn.Module]
) -> tuple[Message, frozenset[str]]:
    try:
        return changes(forward, message, modules)
    except Exception as error:  # the units' own code may raise anything
        if needs_values(error):  # only where memory is predicted (see ``engine.memory.estimate.faking``)
            raise
        raise UnfitError(described(error) + place(error)) from error


def _behind(adapter: nn.Module, unit: Unit) -> Unit:
    """``unit`` with a convolution in front of it."""
    if isinstance(adapter, nn.Identity):
        return unit

    def forward(pair: nn.Module, message: Message) -> Message:
        first, second = pair.children()
        return unit.forward(second, message.with_x(first(message.x)))

    return replace(unit, module=nn.ModuleList([adapter, unit.module]), forward=forward)


def remaining_units(chain: Chain, span: Span, depth: int) -> list[Unit]:
    """The first ``depth`` units of each remaining stage, or as many as the block has if it has fewer, in order."""
    # If any unit has a stage, units without one (a neck) are not part of the backbone.
    staged = any(unit.stage for unit in chain.units)
    stage = chain.units[span.stop - 1].stage
    after = [unit for unit in chain.units[span.stop :] if unit.stage or not staged]
    later = [unit for unit in after if unit.stage != stage]
    chosen: list[Unit] = []
    for unit in later or after:  # in the last stage there is no later one: take what is left of it
        if sum(unit.stage == other.stage for other in chosen) < min(depth, span.stop - span.start):
            chosen.append(unit)
    return chosen
