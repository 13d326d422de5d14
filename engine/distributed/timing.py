"""Time units, auxiliary networks and blocks on the device that trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.config import Config
from engine.distributed.world import World
from engine.learning.auxiliary import build_auxiliary
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.build import arriving_messages, fresh_blocks, keep_only, prepare
from engine.learning.optimizer import build_optimizer
from engine.learning.precision import autocast
from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.cut import Span, best_bounds
from engine.network.message import Message
from engine.network.shapes import infer_shapes, shapes_of
from engine.task import Task

TIMED_STEPS = 5


def time_blocks(config: Config, task: Task, world: World) -> list[float]:
    """Seconds of each block's local step on a synthetic micro-batch, including its auxiliary network.

    Ranks divide the work: each times every ``world.size``-th block, on a copy of the network that is dropped later.
    This is a collective call; every rank gets all times.
    """
    # Not compiled: to compile a copy of every block would take far longer than to time it.
    config = replace(config, local=replace(config.local, compile=False))
    blocks = fresh_blocks(config, task)
    arriving, targets = arriving_messages(blocks, task), task.example().targets
    mine = blocks[world.rank :: world.size]
    keep_only(mine, blocks)
    runs = []
    for block in mine:
        prepare(Blocks([block]), config, world.device)
        runs.append(_stepping(block, _made_up(arriving[block.index], targets, world.device)))
    own = dict(zip([block.index for block in mine], _least(runs, world.device), strict=True))
    every = {index: seconds for part in world.gather(own) for index, seconds in part.items()}
    return [every[index] for index in range(len(blocks))]


def _stepping(block: Block, message: Message) -> Callable[[], object]:
    return lambda: block.local_step(replace(message, sequence=block.next_sequence))


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of forward, backward and update, for each unit and for what would end a block after it.

    ``ends[j]`` is the time of the auxiliary network of a block that ends with unit j; the last entry is the head's.
    """

    units: list[float]
    ends: list[float]

    def block(self, start: int, stop: int) -> float:
        return sum(self.units[start:stop]) + self.ends[stop - 1]

    def cut(self, blocks: int) -> list[int]:
        """The bounds of ``blocks`` blocks of which the slowest is as fast as possible.

        Example:
            >>> UnitTimes([1.0, 1.0, 1.0, 1.0], [2.0, 0.5, 1.0, 0.0]).cut(2)
            [0, 2, 4]
        """
        return best_bounds(len(self.units), blocks, lambda i, j: (self.block(i, j), self.block(i, j) ** 2))[-1][1]


def time_units(config: Config, task: Task, device: torch.device) -> UnitTimes:
    """Time every unit, and the auxiliary network that a block ending there would have, on a synthetic micro-batch.

    Known limitations: recomputation and offload are not timed, and each auxiliary network is that of a block of one
    unit without a feature bank.
    """
    chain = task.build_chain(initial=False)
    targets = task.example().targets
    shape, units, ends = shapes_of(task.example), [], []
    for index, unit in enumerate(chain.units):
        last = index == len(chain) - 1
        message = _made_up(shape, targets, device)
        units += _least([_running(unit, message, config, index > 0)], device)
        shape = infer_shapes(unit, shape, [unit.module])
        # As block 0 or 1 of two: only whether the block is the last one matters here.
        span = Span(int(last), 2, index, index + 1)
        (criterion,) = task.criteria(chain, [span])
        if last:
            network: torch.nn.Module = _Head(chain)
        else:
            network = build_auxiliary(config.local.auxiliary, chain, span, FeatureBank(), task, config.train.seed)
        ends += _least([_ending(network, criterion, _made_up(shape, targets, device), config)], device)
    return UnitTimes(units, ends)


class _Head(torch.nn.Module):
    """The task's own head, with the signature of an auxiliary network."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.module, self._chain = chain.head.module, chain

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        return self._chain.head(message).x


def _running(unit: Unit, message: Message, config: Config, inner: bool) -> Callable[[], None]:
    """A function that runs a unit's part of a step.

    Args:
        inner: whether the unit is not the first of the network, so that its input requires a gradient.
    """
    device = message.x.device
    unit.module.to(device)
    step = _updating(unit.module, config)

    def run() -> None:
        x = message.x.detach()
        if inner and x.is_floating_point():
            x.requires_grad_()
        with autocast(device, config.local.precision):
            # A view, because a unit may change its input in place, which autograd forbids on a leaf.
            output = unit(message.with_x(x.view_as(x))).x
        if output.requires_grad:
            output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
        step()

    return run


def _ending(
    network: torch.nn.Module, criterion: Callable[[Any, Any], Tensor], message: Message, config: Config
) -> Callable[[], None]:
    """A function that runs what ends a block: auxiliary network or head, loss, and backward to the units' output."""
    device = message.x.device
    learning = torch.nn.ModuleList([part for part in (network, criterion) if isinstance(part, torch.nn.Module)])
    step = _updating(learning.to(device), config)

    def run() -> None:
        arriving = message.with_x(message.x.detach().requires_grad_())
        with autocast(device, config.local.precision):
            loss = criterion(network(arriving, arriving.bank), arriving.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        step()

    return run


def _updating(module: torch.nn.Module, config: Config) -> Callable[[], None]:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        return lambda: None
    optimizer = build_optimizer(config.optimizer, named)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _least(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The seconds that each of ``runs`` takes: the shortest of several times, which is the least disturbed one.

    They take turns, so that a change in the machine's speed affects all of them alike.
    """
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + TIMED_STEPS):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in taken]  # the first time includes allocation and the choice of algorithms


def _made_up(shape: Message, targets: object, device: torch.device) -> Message:
    """A message with the shapes of ``shape``, filled with random numbers; integers are 0, which is a valid index."""

    def fill(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape).to(tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    return replace(replace(shape, targets=None).map(fill), targets=targets).to(device)
