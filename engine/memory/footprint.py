"""The footprint of a training step: its bytes by category, by block, and over time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.observer import Observer
from engine.learning.schedules import Schedule, find_schedule
from engine.learning.shared import SharedEncoder
from engine.memory.tracker import MemoryTracker, Moment
from engine.network.message import Message

CATEGORIES = {
    "parameters": "of the units and the head",
    "buffers": "of the units and the head (the statistics of BatchNorm)",
    "gradients": "of these parameters",
    "optimizer": "optimizer state of these parameters",
    "activations": "the batch, messages between blocks, and what the forward pass keeps for backward",
    "auxiliary": "everything that auxiliary networks add: parameters, buffers, gradients, optimizer state, activations",
    "loss": "the same for losses with networks of their own",
    "temporary": "made by backward and update, and freed when they end",
}
"""Every byte counts under exactly one of these categories; the text explains it in a report."""


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the peak of one optimizer step.

    ``peak`` has them by category at the fullest moment of the step. ``by_block`` has them at the fullest moment of each
    block's local steps; this includes what other blocks hold then, such as their gradients while micro-batches
    accumulate. ``timeline`` has them over the whole step.
    """

    peak: dict[str, int]
    by_block: list[dict[str, int]]
    timeline: list[Moment]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def highest(self, *categories: str) -> int:
        """The most bytes that these categories hold together during the step, above the least that they hold."""
        sums = [sum(moment.live.get(name, 0) for name in categories) for moment in self.timeline]
        return max(sums) - min(sums)

    @property
    def by_block_bytes(self) -> list[int]:
        return [sum(sizes.values()) for sizes in self.by_block]


def count_bytes(
    blocks: Blocks,
    config: Config,
    message: Message,
    *,
    beside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Footprint:
    """Run two optimizer steps and count the tensors alive in the second. The first one creates the optimizer state.

    Args:
        blocks: prepared blocks, with real or fake tensors, on the device whose bytes count.
        config: provides the schedule and the accumulation. At most two micro-batches run: in the second one, the
            gradients of all blocks are alive, and any further one would only repeat it.
        message: a micro-batch on that device. It stays alive through the step, as in a training loop. (On a CPU the
            loader keeps the whole batch alive; only a GPU gets its micro-batches one at a time.)
        beside: makes a context around the second step, for other counters.
    """
    schedule, count = find_schedule(config.local.schedule)(blocks), min(config.train.accumulate, 2)
    tracker = MemoryTracker(blocks[0].device.type)
    tracker.add(message.tensors(), "activations")
    peaks: dict[int, Moment] = {}

    with ExitStack() as stack:
        for block in blocks.learners:
            stack.enter_context(Followed(tracker, block, peaks))
        stack.enter_context(tracker)
        optimizer_step(schedule, message, count)
        peaks.clear()  # the first step lacks optimizer state, so its peaks are too low
        tracker.record()
        with beside():
            optimizer_step(schedule, message, count)
    highest = max(peaks.values(), key=lambda moment: moment.bytes)
    assert tracker.timeline is not None
    return Footprint(_whole(highest), [_whole(peaks[block.index]) for block in blocks], tracker.timeline)


def optimizer_step(schedule: Schedule, message: Message, micro_batches: int) -> None:
    """Run one optimizer step that uses the same micro-batch ``micro_batches`` times."""
    for number in range(micro_batches):
        passing = replace(message, sequence=schedule.blocks[0].next_sequence)
        schedule.step(passing, update=number == micro_batches - 1, weight=1 / micro_batches)


def _whole(moment: Moment) -> dict[str, int]:
    assert moment.live.keys() <= CATEGORIES.keys()
    return {name: moment.live.get(name, 0) for name in CATEGORIES}


class Followed(Observer):
    """A context in which a tracker knows the state of one block, and the block's peak is recorded.

    Args:
        tracker: counts the block's tensors.
        block: a prepared block.
        peaks: receives the fullest moment of the block's local steps, under the block's index.
    """

    def __init__(self, tracker: MemoryTracker, block: Block, peaks: dict[int, Moment]) -> None:
        self.tracker, self.block, self.peaks = tracker, block, peaks
        criterion = block.criterion if isinstance(block.criterion, nn.Module) else None
        self._parts = [(name, part) for name, part in (("auxiliary", block.auxiliary), ("loss", criterion)) if part]
        self._extra = {
            id(tensor): name for name, part in self._parts for tensor in (*part.parameters(), *part.buffers())
        }
        self._stack = ExitStack()

    def __enter__(self) -> Followed:
        block, tracker = self.block, self.tracker
        assert block.optimizer is not None
        for parameter in block.parameters():
            tracker.add([parameter], self._category(parameter, "parameters"))
            if parameter.requires_grad:
                # A gradient is made inside backward, where it counts as temporary until this hook names it.
                handle = parameter.register_post_accumulate_grad_hook(self._count_gradient)  # type: ignore[no-untyped-call]
                self._stack.callback(handle.remove)
        for buffer in block.buffers():
            tracker.add([buffer], self._category(buffer, "buffers"))
        self._count_state(block.optimizer)
        self._stack.callback(block.optimizer.register_step_post_hook(self._count_state).remove)
        # From here on, everything that the forward pass makes belongs to the auxiliary network or to the loss.
        for name, part in self._parts:
            self._stack.callback(part.register_forward_pre_hook(self._made_in(name)).remove)
        block.observers.append(self)
        self._stack.callback(block.observers.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def started(self) -> None:
        self.tracker.block = self.block.index
        self.tracker.reset_peak()

    def backward_started(self) -> None:
        self.tracker.made_in_forward = "activations"  # from here on, gradients are enabled only to recompute units

    def ended(self, output: Message | None) -> None:
        peak, index = self.tracker.peak, self.block.index
        self.peaks[index] = max(peak, self.peaks.get(index, peak), key=lambda moment: moment.bytes)
        # The message outlives the local step. An encoder's output counts as activations already, since its graph stays.
        if output is not None and not isinstance(self.block, SharedEncoder):
            self.tracker.keep(output.tensors())

    def _category(self, tensor: Tensor, own: str) -> str:
        return self._extra.get(id(tensor), own)

    def _count_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.tracker.add([parameter.grad], self._category(parameter, "gradients"))

    def _count_state(self, stepped: torch.optim.Optimizer, *_: object) -> None:
        for parameter, state in stepped.state.items():
            tensors = (value for value in state.values() if isinstance(value, Tensor))
            self.tracker.add(tensors, self._category(parameter, "optimizer"))

    def _made_in(self, name: str) -> Callable[..., None]:
        def change(*_: object) -> None:
            self.tracker.made_in_forward = name

        return change
