"""What a training step holds in memory: bytes by category, by block, and over the course of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.block import Block, Report
from engine.config import Config
from engine.memory.tracker import MemoryTracker, Moment
from engine.message import Message
from engine.schedules import SCHEDULES, Schedule
from engine.shared import SharedEncoder, with_encoder

CATEGORIES = {
    "parameters": "of the units and the head",
    "buffers": "of the units and the head (BatchNorm's statistics)",
    "gradients": "of these parameters",
    "optimizer": "state of the optimizer for these parameters",
    "activations": "the batch, messages between blocks, and what the forward pass keeps for backward",
    "auxiliary": "all that auxiliary networks add: parameters, buffers, gradients, optimizer state, activations",
    "loss": "the same of losses with networks of their own",
    "temporary": "made by backward and update, and gone when they end",
}
"""Every byte counts under one of these."""


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the peak of one optimizer step.

    ``by_block`` has the peak while each block's local step runs (in the last micro-batch, say, the
    gradients of all blocks are alive), ``timeline`` the course of the step.
    """

    peak: dict[str, int]
    by_block: list[dict[str, int]]
    timeline: list[Moment]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def highest(self, *categories: str) -> int:
        """The most bytes that these categories have together in the course of the step, beyond what always stays."""
        sums = [sum(moment.live.get(name, 0) for name in categories) for moment in self.timeline]
        return max(sums) - min(sums)

    @property
    def by_block_bytes(self) -> list[int]:
        return [sum(sizes.values()) for sizes in self.by_block]


def count_bytes(
    blocks: Sequence[Block],
    config: Config,
    message: Message,
    *,
    beside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Footprint:
    """Run two optimizer steps and count the tensors alive in the second; optimizer state is born in the first.

    Args:
        blocks: prepared ones, on the device whose bytes count, real or fake.
        config: its schedule runs, with its accumulation. Of many micro-batches two are run: the gradients
            of all blocks are alive in the second, so that further ones only repeat it.
        message: a micro-batch, on that device. It stays alive through the step, as in a training loop. (On a
            CPU the loader's whole batch does; only a GPU has micro-batches moved to it one at a time.)
        beside: a context around the second step, for other counts.
    """
    schedule, count = SCHEDULES[config.local.schedule](blocks), min(config.train.accumulate, 2)
    tracker = MemoryTracker(blocks[0].device.type)
    tracker.add(message.tensors(), "activations")
    peaks: dict[int, Moment] = {}

    with ExitStack() as stack:
        for block in with_encoder(blocks):
            stack.enter_context(followed(tracker, block, peaks))
        stack.enter_context(tracker)
        optimizer_step(schedule, message, count)
        peaks.clear()
        tracker.record()
        with beside():
            optimizer_step(schedule, message, count)
    highest = max(peaks.values(), key=lambda moment: moment.bytes)
    assert tracker.timeline is not None
    return Footprint(_whole(highest), [_whole(peaks[block.index]) for block in blocks], tracker.timeline)


def optimizer_step(schedule: Schedule, message: Message, micro_batches: int) -> None:
    """One optimizer step on the same micro-batch so many times."""
    for number in range(micro_batches):
        passing = replace(message, sequence=schedule.blocks[0].next_sequence)
        schedule.step(passing, update=number == micro_batches - 1, weight=1 / micro_batches)


def _whole(moment: Moment) -> dict[str, int]:
    assert moment.live.keys() <= CATEGORIES.keys()
    return {name: moment.live.get(name, 0) for name in CATEGORIES}


@contextmanager
def followed(tracker: MemoryTracker, block: Block, peaks: dict[int, Moment]) -> Iterator[None]:
    """Meanwhile ``block``'s state is known to the tracker, and its peak is noted in ``peaks``."""
    auxiliary, optimizer = block.auxiliary, block.optimizer
    criterion = block.criterion if isinstance(block.criterion, nn.Module) else None
    assert optimizer is not None
    extra = {
        id(tensor): name
        for name, part in (("auxiliary", auxiliary), ("loss", criterion))
        for tensor in ([*part.parameters(), *part.buffers()] if part is not None else ())
    }

    def category(tensor: Tensor, own: str) -> str:
        return extra.get(id(tensor), own)

    def count_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.add([parameter.grad], category(parameter, "gradients"))

    def count_state(stepped: torch.optim.Optimizer, *_: object) -> None:
        for parameter, state in stepped.state.items():
            tensors = (value for value in state.values() if isinstance(value, Tensor))
            tracker.add(tensors, category(parameter, "optimizer"))

    plain_step = block.local_step

    def note(run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            tracker.block = block.index
            tracker.reset_peak()
            result = run(*arguments, **options)
            highest = max(tracker.peak, peaks.get(block.index, tracker.peak), key=lambda moment: moment.bytes)
            peaks[block.index] = highest
            return result

        return noted

    def local_step(message: Message, **options: Any) -> tuple[Message, Report]:
        output, report = note(lambda: plain_step(message, **options))()
        tracker.keep(output.tensors())
        return output, report

    def made_in(name: str) -> Callable[..., None]:
        def change(*_: object) -> None:
            tracker.made_in_forward = name

        return change

    with ExitStack() as stack:
        for parameter in block.parameters():
            tracker.add([parameter], category(parameter, "parameters"))
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(count_gradient)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        for buffer in block.buffers():
            tracker.add([buffer], category(buffer, "buffers"))
        count_state(optimizer)
        stack.callback(optimizer.register_step_post_hook(count_state).remove)
        if auxiliary is not None:
            stack.callback(auxiliary.register_forward_pre_hook(made_in("auxiliary")).remove)
        if criterion is not None:
            stack.callback(criterion.register_forward_pre_hook(made_in("loss")).remove)
        if auxiliary is not None or criterion is not None:
            way = block.replication or block
            plain_backward = way.train_backward

            def train_backward(loss: Tensor) -> None:
                made_in("activations")()  # what is computed again from here on is the units'
                plain_backward(loss)

            way.train_backward = train_backward  # type: ignore[method-assign]
            stack.callback(lambda: delattr(way, "train_backward"))
        if isinstance(block, SharedEncoder):
            for name in ("encode", "learn"):
                setattr(block, name, note(getattr(block, name)))
                stack.callback(delattr, block, name)
        block.local_step = local_step  # type: ignore[method-assign]
        stack.callback(lambda: delattr(block, "local_step"))
        yield
