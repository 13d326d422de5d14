"""Balance: how long units, auxiliary networks and blocks take, and what divides them evenly over stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.auxiliary import build_auxiliary
from engine.bank import FeatureBank
from engine.block import Block, autocast
from engine.build import build_blocks, prepare
from engine.chain import Chain, Unit
from engine.config import Config
from engine.cut import Span, best_bounds
from engine.log import size_text
from engine.memory.estimate import make_fake
from engine.memory.footprint import count_bytes
from engine.memory.plan import parse_size
from engine.message import Message
from engine.optimizer import build_optimizer
from engine.shapes import infer_shapes, shapes_of
from engine.task import Task
from engine.world import World

TIMED_STEPS = 5


def balance(seconds: Sequence[float], stages: int, sizes: Sizes | None = None, budget: str = "") -> list[int]:
    """Bounds of consecutive blocks whose slowest stage is as fast as can be, within a budget of memory.

    Args:
        seconds: of each block's local step, its auxiliary network included.
        sizes: tells the bytes of a stage; without it no budget counts.

    Raises:
        ValueError: no placement keeps the budget; has the least that one would need.

    Example:
        >>> balance([1.0, 1.0, 1.0, 3.0], 2)
        [0, 3, 4]
    """
    sums = [0.0, *accumulate(seconds)]
    limit = parse_size(budget, "placement.memory") if sizes else 0

    def cost(start: int, stop: int) -> tuple[float, float]:
        own = sums[stop] - sums[start]
        if sizes and sizes.stage(start, stop) > limit:
            own = float("inf")
        return own, own**2

    slowest, bounds = best_bounds(len(seconds), stages, cost)[-1]
    if slowest == float("inf"):
        assert sizes is not None
        least, _ = best_bounds(len(seconds), stages, lambda start, stop: (sizes.stage(start, stop), 0))[-1]
        raise ValueError(
            f"placement.memory: no placement on {stages} stages keeps {budget}; the least is {size_text(least)}; "
            "start more ranks, or raise local.blocks"
        )
    return bounds


def time_blocks(config: Config, task: Task, world: World) -> list[float]:
    """Seconds of each block's local step on a made-up micro-batch, its auxiliary network included.

    Ranks share the work: rank r times every ``world.size``-th block, on a copy of its own that is dropped.
    """
    config = replace(config, local=replace(config.local, compile=False))
    blocks = build_blocks(task.build_chain(initial=False), config, task)
    arriving, targets = arriving_messages(blocks, task), task.example().targets
    mine = blocks[world.rank :: world.size]
    keep_only(mine, blocks)
    runs = []
    for block in mine:
        prepare([block], config, world.device)
        runs.append(_stepping(block, _made_up(arriving[block.index], targets, world.device)))
    own = dict(zip([block.index for block in mine], _least(runs, world.device), strict=True))
    every = {index: seconds for part in world.gather(own) for index, seconds in part.items()}
    return [every[index] for index in range(len(blocks))]


def _stepping(block: Block, message: Message) -> Callable[[], object]:
    return lambda: block.local_step(replace(message, sequence=block.next_sequence))


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of each unit's forward, backward and update, and of what would end a block after it.

    ``ends[j]`` is the auxiliary network's of a block that ends with unit j; the last one is the head's.
    """

    units: list[float]
    ends: list[float]

    def block(self, start: int, stop: int) -> float:
        return sum(self.units[start:stop]) + self.ends[stop - 1]

    def cut(self, blocks: int) -> list[int]:
        """Bounds of so many blocks, the slowest as fast as can be.

        Example:
            >>> UnitTimes([1.0, 1.0, 1.0, 1.0], [2.0, 0.5, 1.0, 0.0]).cut(2)
            [0, 2, 4]
        """
        return best_bounds(len(self.units), blocks, lambda i, j: (self.block(i, j), self.block(i, j) ** 2))[-1][1]


def even_out(bounds: Sequence[int], measure: Callable[[list[int]], list[float]]) -> tuple[list[int], list[float]]:
    """Move bounds by a unit as long as the slowest block gets faster by it.

    Args:
        measure: seconds of the blocks between bounds.

    Returns:
        The bounds, and what was measured with them.

    Example:
        >>> from itertools import pairwise
        >>> even_out([0, 3, 4], lambda bounds: [float(stop - start) for start, stop in pairwise(bounds)])
        ([0, 2, 4], [2.0, 2.0])
    """
    best, seconds = list(bounds), measure(list(bounds))
    while True:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        neighbours = [n for n in (slowest - 1, slowest + 1) if 0 <= n < len(seconds)]
        for other in sorted(neighbours, key=seconds.__getitem__):
            tried = best.copy()
            tried[max(slowest, other)] += 1 if other < slowest else -1
            if tried[slowest] == tried[slowest + 1]:
                continue  # it has but one unit
            taken = measure(tried)
            if max(taken) < 0.99 * max(seconds):  # the rest is noise
                best, seconds = tried, taken
                break
        else:
            return best, seconds


def time_units(config: Config, task: Task, device: torch.device) -> UnitTimes:
    """Time every unit, and every auxiliary network that a block ending there would have, on a made-up micro-batch.

    Known limitations: no activation checkpointing or offload, and an auxiliary network is that of a block of one
    unit, without a feature bank.
    """
    chain = task.build_chain(initial=False)
    targets = task.example().targets
    shape, units, ends = shapes_of(task.example), [], []
    for index, unit in enumerate(chain.units):
        last = index == len(chain) - 1
        message = _made_up(shape, targets, device)
        units += _least([_running(unit, message, config, index > 0)], device)
        shape = infer_shapes(unit, shape, [unit.module])
        span = Span(int(last), 2, index, index + 1)
        (criterion,) = task.criteria(chain, [span])
        if last:
            network: torch.nn.Module = _Head(chain)
        else:
            network = build_auxiliary(config.local.auxiliary, chain, span, FeatureBank(), task, config.train.seed)
        ends += _least([_ending(network, criterion, _made_up(shape, targets, device), config)], device)
    return UnitTimes(units, ends)


class _Head(torch.nn.Module):
    """The task's own head, called as an auxiliary network is."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.module, self._chain = chain.head.module, chain

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        return self._chain.head(message).x


def _running(unit: Unit, message: Message, config: Config, inner: bool) -> Callable[[], None]:
    """A unit's share of a step: its input wants a gradient unless it is the network's first."""
    device = message.x.device
    unit.module.to(device)
    step = _updating(unit.module, config)

    def run() -> None:
        x = message.x.detach()
        if inner and x.is_floating_point():
            x.requires_grad_()
        with autocast(device, config.local.precision):
            output = unit(message.with_x(x.view_as(x))).x  # a view: a unit may change what it gets in place
        if output.requires_grad:
            output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
        step()

    return run


def _ending(
    network: torch.nn.Module, criterion: Callable[[Any, Any], Tensor], message: Message, config: Config
) -> Callable[[], None]:
    """A block's end in a step: auxiliary network or head, the loss, and back to what the block sends."""
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
    """Seconds of each, in turns, so that drift of the machine's speed meets all; the least disturbed time of each."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + TIMED_STEPS):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in taken]  # the first was to warm up


def _made_up(shape: Message, targets: object, device: torch.device) -> Message:
    """A message of random numbers."""

    def fill(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape).to(tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    return replace(replace(shape, targets=None).map(fill), targets=targets).to(device)


def arriving_messages(blocks: Sequence[Block], task: Task) -> list[Message]:
    """The message that reaches each block from the task's example, as meta tensors; blocks are on the CPU."""
    message, arriving = shapes_of(task.example), []
    for block in blocks:
        arriving.append(message)

        def forward(message: Message, block: Block = block) -> Message:
            output: Message = block(message)
            if block.keeps_key_features:
                key = task.key_features(block.chain, output)
                output = replace(output, bank=message.bank.add(block.index, key))
            return output

        message = infer_shapes(forward, message, [block])
    return arriving


def keep_only(own: Sequence[Block], blocks: Sequence[Block]) -> None:
    """Free the parameters and buffers of the blocks that other ranks have; their shapes stay known."""
    kept = {id(module) for block in own for module in block.modules()}  # losses may share frozen networks
    for block in blocks:
        if block not in own:
            for module in block.modules():
                if id(module) not in kept:
                    module._apply(lambda tensor: tensor.to("meta"), recurse=False)  # type: ignore[no-untyped-call]


class Sizes:
    """Bytes of stages, estimated on fake tensors block by block."""

    def __init__(self, config: Config, task: Task) -> None:
        blocks = build_blocks(task.build_chain(initial=False), config, task)
        arriving = arriving_messages(blocks, task)
        sizes = [sum(tensor.nbytes for tensor in message.tensors()) for message in arriving]
        # Beside the one being worked on: those that wait at the near and at the far end of a link.
        self._waiting = [config.placement.depth * size for size in [*sizes, 0]]
        self._states, self._peaks = [], []
        plain = replace(config, local=replace(config.local, compile=False))
        with FakeTensorMode():
            make_fake([blocks[0].chain.model, *blocks])
            for block, message in zip(blocks, arriving, strict=True):
                block.scaled = False  # a scaler asks for values, and fake tensors have none
                prepare([block], plain, torch.device("cpu"))
                message = message.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
                self._peaks.append(count_bytes([block], plain, message).peak_bytes)
                assert block.optimizer is not None
                held = [*block.parameters(), *block.buffers()]
                held += [value for state in block.optimizer.state.values() for value in state.values()]
                self._states.append(sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor)))

    def stage(self, start: int, stop: int) -> float:
        """Bytes at the peak of a stage with blocks ``start`` to ``stop - 1``."""
        beyond = max(p - s for p, s in zip(self._peaks[start:stop], self._states[start:stop], strict=True))
        links = (self._waiting[start] if start else 0) + self._waiting[stop]
        return sum(self._states[start:stop]) + beyond + links
