"""What each unit and each auxiliary network adds to a step, so that a cut can be judged without being run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.auxiliary import AuxiliaryNetwork, build_auxiliary
from engine.bank import FeatureBank
from engine.block import Block, autocast
from engine.build import build_blocks, prepare
from engine.chain import Unit
from engine.config import Config
from engine.cut import Span
from engine.memory.estimate import make_fake
from engine.memory.footprint import followed
from engine.memory.tracker import MemoryTracker
from engine.memory.work import Speed, WorkCounter
from engine.message import Message
from engine.optimizer import build_optimizer
from engine.shapes import shapes_of
from engine.shared import with_encoder
from engine.task import Task


@dataclass
class UnitCost:
    """Bytes and seconds of one unit in a step; bytes beyond what is alive before its forward pass.

    ``forward`` and ``backward`` are the peaks of the two passes, without the gradients of later units'
    parameters; ``kept`` stays between them, ``gradients`` after them; ``output`` is the message it sends.
    """

    forward: int = 0
    kept: int = 0
    backward: int = 0
    gradients: int = 0
    output: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class EndCost:
    """Bytes and seconds of what ends a block: an auxiliary network, or the head.

    ``state`` is there all the time (0 for the head: it belongs to the network), ``peak`` that of its
    forward and backward passes, ``gradients`` stays after them.
    """

    state: int
    peak: int
    gradients: int
    seconds: float


class Profile:
    """Costs of a chain's parts under one config, from end-to-end steps on fake tensors.

    Args:
        config: precision, optimizer, accumulation and auxiliary network; its cut does not count.
        task: gives chain, loss and a micro-batch.
        speed: of the device that will train.

    Known limitation: an auxiliary network is profiled without a feature bank and for a few lengths of
    block only, so that a cut's true peak may be a little off: who chooses by a profile estimates the choice.
    """

    def __init__(self, config: Config, task: Task, speed: Speed) -> None:
        self._config, self._task, self._speed = config, task, speed
        self.can_recompute = not (config.local.compile or config.local.offload)
        self._plain = _Trace(config, task, speed, checkpointing=False)
        self._recomputed = _Trace(config, task, speed, checkpointing=True).units if self.can_recompute else []
        self._auxiliaries: dict[tuple[int, int], EndCost] = {}
        self._alike: dict[object, EndCost] = {}
        # Of several micro-batches, the gradients of all blocks stay alive from one to the next.
        self._gradients_stay = config.train.accumulate > 1

    def __len__(self) -> int:
        return len(self._plain.units)

    @property
    def names(self) -> list[str]:
        """Of the units."""
        return [unit.name for unit in self._plain.chain.units]

    @property
    def permanent(self) -> int:
        """Bytes of the network's parameters, buffers and optimizer state."""
        return self._plain.fixed - self._plain.batch

    @property
    def least(self) -> int:
        """Bytes that no cut can do without: parameters, buffers, optimizer state, the batch."""
        gradients = sum(unit.gradients for unit in self._plain.units) + self._plain.head.gradients
        return self._plain.fixed + (gradients if self._gradients_stay else 0)

    def trainable(self, start: int, stop: int) -> bool:
        """Whether a block would have anything to train."""
        return any(unit.gradients for unit in self._plain.units[start:stop]) or (
            stop == len(self) and self._plain.head.gradients > 0
        )

    def state(self, start: int, stop: int) -> int:
        """Bytes that the auxiliary network of a block adds to ``least``."""
        end = self._end(start, stop)
        return end.state + (end.gradients if self._gradients_stay and stop < len(self) else 0)

    def peak(self, start: int, stop: int, checkpointing: bool) -> int:
        """Bytes at the peak of a block's local step, beyond ``least`` and every block's ``state``."""
        units, end = self._units(start, stop, checkpointing), self._end(start, stop)
        stays = 0 if self._gradients_stay else 1
        base = self._plain.units[start - 1].output if start else 0
        peaks, gradients = [], end.gradients * stays
        for unit in units:
            peaks.append(base + unit.forward)
            base += unit.kept
        peaks.append(base + end.peak)
        for unit in reversed(units):
            base -= unit.kept
            peaks.append(base + unit.backward + gradients)
            gradients += unit.gradients * stays
            if unit is units[-1] and stop < len(self):
                base += unit.output  # waits to be sent on
        # An update may take another copy of the gradients.
        own = end.gradients + sum(unit.gradients for unit in units)
        peaks.append(base + gradients + own)
        return max(peaks)

    def seconds(self, start: int, stop: int, checkpointing: bool) -> float:
        """Of a block's local steps on all micro-batches of a batch."""
        units = self._units(start, stop, checkpointing)
        once = self._end(start, stop).seconds + sum(unit.seconds for unit in units)
        return once * self._config.train.accumulate

    def _units(self, start: int, stop: int, checkpointing: bool) -> list[UnitCost]:
        if not checkpointing:
            return self._plain.units[start:stop]
        return [*self._recomputed[start : stop - 1], self._plain.units[stop - 1]]

    def _end(self, start: int, stop: int) -> EndCost:
        """The head, or the auxiliary network of the next lower power of two units that end where the block does."""
        if stop == len(self):
            return self._plain.head
        start = stop - (1 << ((stop - start).bit_length() - 1))
        if (start, stop) not in self._auxiliaries:
            self._auxiliaries[start, stop] = self._auxiliary(start, stop)
        return self._auxiliaries[start, stop]

    def _auxiliary(self, start: int, stop: int) -> EndCost:
        config, trace = self._config, self._plain
        with trace.fake:
            span = Span(0, 2, start, stop)
            network = build_auxiliary(
                config.local.auxiliary, trace.chain, span, FeatureBank(), self._task, config.train.seed
            )
            message = trace.messages[stop - 1].map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            # Along a stage they are all alike; such a one is stepped once.
            shapes = tuple((name, tuple(value.shape)) for name, value in network.state_dict().items())
            key = type(network), shapes, tuple(message.x.shape), message.x.dtype
            if key not in self._alike:
                (criterion,) = self._task.criteria(trace.chain, [span])
                self._alike[key] = self._step(network, criterion, message)
            return self._alike[key]

    def _step(self, network: AuxiliaryNetwork, criterion: Callable[[Any, Any], Tensor], message: Message) -> EndCost:
        """Two steps of an auxiliary network and its loss on their own; the second counts."""
        learning = list(network.named_parameters())
        held: list[Tensor] = [*network.parameters(), *network.buffers()]
        if isinstance(criterion, torch.nn.Module):
            learning += [(name, p) for name, p in criterion.named_parameters() if p.requires_grad]
            held += criterion.parameters()  # frozen networks are buffers, which blocks share and the network counts
        optimizer = build_optimizer(self._config.optimizer, learning)
        tracker, work = MemoryTracker(), WorkCounter(self._speed)
        tracker.add(message.tensors(), "activations")
        before = tracker.live_bytes
        tracker.add(held, "auxiliary")
        with tracker, work:
            for _ in range(2):
                state, seconds = tracker.live_bytes - before, work.seconds
                tracker.reset_peak()
                arriving = message.with_x(message.x.detach().requires_grad_())
                with autocast(torch.device("cpu"), self._config.local.precision):
                    loss = criterion(network(arriving, arriving.bank), arriving.targets)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss, arriving
                peak = tracker.peak.bytes - before - state
                gradients = tracker.live_bytes - before - state
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return EndCost(state, peak, gradients, work.seconds - seconds)


class _Trace:
    """An end-to-end step, unit by unit.

    The forward pass runs through the units, then the head and its backward pass; the gradient of a unit's
    output tells that the backward pass has come to that unit::

        forward:   unit 0 | unit 1 | ... | head, loss, backward of the head
        backward:                        | unit n-1 | ... | unit 1 | unit 0 | update
    """

    def __init__(self, config: Config, task: Task, speed: Speed, *, checkpointing: bool) -> None:
        local = replace(config.local, schedule="end_to_end", checkpoint=checkpointing, compile=False)
        config = replace(config, local=local, train=replace(config.train, accumulate=1))
        self.fake, self.chain = FakeTensorMode(), task.build_chain(initial=False)
        (block,) = build_blocks(self.chain, config, task)
        self.units = [UnitCost() for _ in block.units]
        self.messages: list[Message] = []
        with self.fake:
            make_fake([self.chain.model, block])
            block.scaled = False
            prepare([block], config, torch.device("cpu"))
            message = shapes_of(task.example).map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            tracker, work = MemoryTracker(), WorkCounter(speed)
            tracker.add(message.tensors(), "activations")
            self.batch = tracker.live_bytes
            with ExitStack() as stack:
                for each in with_encoder([block]):
                    stack.enter_context(followed(tracker, each, {}))
                stack.enter_context(tracker)
                stack.enter_context(work)
                for sequence in range(2):
                    arriving = replace(message, sequence=sequence)
                    for encoder in block.encoders:
                        arriving = encoder.encode(arriving)
                    if sequence == 0:
                        block.local_step(arriving)
                    else:
                        self.fixed = tracker.live_bytes
                        self._trace(block, arriving, tracker, work)
                    for encoder in block.encoders:
                        encoder.learn(update=True)

    def _trace(self, block: Block, message: Message, tracker: MemoryTracker, work: WorkCounter) -> None:
        head = UnitCost()
        base = {id(cost): 0 for cost in [*self.units, head]}
        current, started, gradients = head, 0.0, 0

        def enter(cost: UnitCost) -> None:
            """The backward pass leaves one unit for another."""
            nonlocal current, started, gradients
            current.backward = tracker.peak.bytes - base[id(current)] - gradients
            current.gradients = tracker.live["gradients"] - gradients
            current.seconds += work.seconds - started
            current, started, gradients = cost, work.seconds, tracker.live["gradients"]
            tracker.reset_peak()

        plain_run = block._run

        def run(unit: Unit, message: Message) -> Message:
            nonlocal started
            cost = self.units[len(self.messages)]
            base[id(cost)] = live = tracker.live_bytes
            started = work.seconds
            tracker.reset_peak()
            output = plain_run(unit, message)
            cost.forward, cost.kept = tracker.peak.bytes - live, tracker.live_bytes - live
            cost.seconds, started = work.seconds - started, work.seconds
            tensors = output.tensors()
            cost.output = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
            if output.x.requires_grad:
                output.x.register_hook(lambda _: enter(cost))  # type: ignore[no-untyped-call]
            self.messages.append(output.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")))
            base[id(head)] = tracker.live_bytes
            tracker.reset_peak()
            return output

        with ExitStack() as stack:
            assert block.optimizer is not None
            block._run = run  # type: ignore[method-assign]
            stack.callback(lambda: delattr(block, "_run"))
            stack.callback(block.optimizer.register_step_pre_hook(lambda *_: enter(UnitCost())).remove)
            block.local_step(message)
        self.head = EndCost(0, head.backward, head.gradients, head.seconds)
