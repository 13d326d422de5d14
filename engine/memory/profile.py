"""The profile of a network: what each unit and each auxiliary network adds to a step, to judge cuts without a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import Config, Recompute
from engine.learning.auxiliary import AuxiliaryNetwork, build_auxiliary
from engine.learning.block import Block
from engine.learning.build import build_blocks, prepare
from engine.learning.observer import Observer
from engine.learning.optimizer import build_optimizer
from engine.learning.precision import autocast
from engine.memory.estimate import fake_message, faking, make_fake
from engine.memory.footprint import Followed
from engine.memory.tracker import MemoryTracker
from engine.memory.work import Speed, WorkCounter
from engine.network.bank import FeatureBank
from engine.network.chain import Unit
from engine.network.cut import Span
from engine.network.message import Message
from engine.network.shapes import shapes_of
from engine.network.state import tensors_of
from engine.task import Task


@dataclass
class UnitCost:
    """Bytes and seconds of one unit in a step; bytes count beyond what is alive before its forward pass.

    ``forward`` and ``backward`` are the peaks of the two passes, without the gradients of parameters of later units.
    ``kept`` stays alive between the two passes and ``gradients`` after them. ``output`` is the size of the message that
    the unit returns.
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

    ``state`` is alive all the time (0 for the head, which belongs to the network). ``peak`` is the peak of forward and
    backward, and ``gradients`` stays alive after them.
    """

    state: int
    peak: int
    gradients: int
    seconds: float


class Profile:
    """The costs of a chain's parts under one config, from end-to-end steps on fake tensors.

    Args:
        config: provides precision, optimizer, accumulation and auxiliary network; its cut does not matter.
        task: provides the chain, the loss and a micro-batch.
        speed: the speed of the device that will train.

    Raises:
        ValueError: as ``faking``.

    Known limitation: auxiliary networks are profiled without a feature bank, and for a few lengths of block only, so
    the true peak of a cut may differ a little. A caller that chooses by a profile should estimate its choice.
    """

    def __init__(self, config: Config, task: Task, speed: Speed) -> None:
        self._config, self._task, self._speed = config, task, speed
        self.can_recompute = not (config.local.compile or config.local.offload)
        self._plain = _Trace(config, task, speed, recompute="none")
        self._recomputed = _Trace(config, task, speed, recompute="units").units if self.can_recompute else []
        self._auxiliaries: dict[tuple[int, int], EndCost] = {}
        self._alike: dict[object, EndCost] = {}
        # Between micro-batches of one step, the gradients of all blocks stay alive.
        self._gradients_stay = config.train.accumulate > 1

    def __len__(self) -> int:
        return len(self._plain.units)

    @property
    def names(self) -> list[str]:
        """The names of the units."""
        return [unit.name for unit in self._plain.chain.units]

    @property
    def permanent(self) -> int:
        """The bytes of the network's parameters, buffers and optimizer state."""
        return self._plain.fixed - self._plain.batch

    @property
    def least(self) -> int:
        """The bytes that any cut needs all the time: parameters, buffers, optimizer state and the batch.

        With several micro-batches, these include the gradients.
        """
        gradients = sum(unit.gradients for unit in self._plain.units) + self._plain.head.gradients
        return self._plain.fixed + (gradients if self._gradients_stay else 0)

    def trainable(self, start: int, stop: int) -> bool:
        """Whether a block of units ``start`` to ``stop - 1`` would have anything to train."""
        return any(unit.gradients for unit in self._plain.units[start:stop]) or (
            stop == len(self) and self._plain.head.gradients > 0
        )

    def state(self, start: int, stop: int) -> int:
        """The bytes that the auxiliary network of a block adds to ``least``."""
        end = self._end(start, stop)
        return end.state + (end.gradients if self._gradients_stay and stop < len(self) else 0)

    def peak(self, start: int, stop: int, recompute: Recompute) -> int:
        """The bytes at the peak of a block's local step, beyond ``least`` and the ``state`` of all blocks.

        The local step is replayed from the costs: forward through the units, then the auxiliary network or head, then
        backward through the units in reverse order, and the update. ``base`` is what is alive between two of these.
        """
        units, end = self._units(start, stop, recompute), self._end(start, stop)
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
                base += unit.output  # the detached message waits to be sent until the local step ends
        # An optimizer that works on lists of tensors may copy all gradients of the block.
        own = end.gradients + sum(unit.gradients for unit in units)
        peaks.append(base + gradients + own)
        return max(peaks)

    def seconds(self, start: int, stop: int, recompute: Recompute) -> float:
        """The seconds of a block's local steps on all micro-batches of a batch."""
        units = self._units(start, stop, recompute)
        once = self._end(start, stop).seconds + sum(unit.seconds for unit in units)
        return once * self._config.train.accumulate

    def _units(self, start: int, stop: int, recompute: Recompute) -> list[UnitCost]:
        if recompute == "none":
            return self._plain.units[start:stop]
        return [*self._recomputed[start : stop - 1], self._plain.units[stop - 1]]

    def _end(self, start: int, stop: int) -> EndCost:
        """The head, or the auxiliary network of a block that ends at ``stop``.

        The block's length is rounded down to a power of two: an auxiliary network depends little on the length of its
        block, and this way a chain of n units needs about n log n profiles instead of n squared.
        """
        if stop == len(self):
            return self._plain.head
        start = stop - (1 << ((stop - start).bit_length() - 1))
        if (start, stop) not in self._auxiliaries:
            self._auxiliaries[start, stop] = self._auxiliary(start, stop)
        return self._auxiliaries[start, stop]

    def _auxiliary(self, start: int, stop: int) -> EndCost:
        config, trace = self._config, self._plain
        with faking(trace.fake):
            span = Span(0, 2, start, stop)
            network = build_auxiliary(
                config.local.auxiliary, trace.chain, span, FeatureBank(), self._task, config.train.seed
            )
            message = fake_message(trace.messages[stop - 1])
            # Most auxiliary networks of a stage are alike, so each distinct one runs only once.
            shapes = tuple((name, tuple(value.shape)) for name, value in tensors_of(network).items())
            key = type(network), shapes, tuple(message.x.shape), message.x.dtype
            if key not in self._alike:
                (criterion,) = self._task.criteria(trace.chain, [span])
                self._alike[key] = self._step(network, criterion, message)
            return self._alike[key]

    def _step(self, network: AuxiliaryNetwork, criterion: Callable[[Any, Any], Tensor], message: Message) -> EndCost:
        """Run two steps of an auxiliary network and its loss alone, and count the second, which has optimizer state."""
        learning = list(network.named_parameters())
        held: list[Tensor] = [*network.parameters(), *network.buffers()]
        if isinstance(criterion, torch.nn.Module):
            learning += [(name, p) for name, p in criterion.named_parameters() if p.requires_grad]
            held += criterion.parameters()  # not its buffers: a frozen network that blocks share counts only once
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
    """The costs of an end-to-end step, unit by unit.

    The forward pass runs through the units and the head. In backward, a hook on the gradient of a unit's output tells
    that the backward pass has reached this unit::

        forward:   unit 0 | unit 1 | ... | head, loss, backward of the head
        backward:                        | unit n-1 | ... | unit 1 | unit 0 | update
    """

    def __init__(self, config: Config, task: Task, speed: Speed, *, recompute: Recompute) -> None:
        local = replace(config.local, schedule="end_to_end", recompute=recompute, compile=False)
        config = replace(config, local=local, train=replace(config.train, accumulate=1))
        self.fake, self.chain = FakeTensorMode(), task.build_chain(initial=False)
        blocks = build_blocks(self.chain, config, task)
        (block,), encoder = blocks, blocks.encoder
        self.units = [UnitCost() for _ in block.units]
        with faking(self.fake):
            make_fake([self.chain.model, block])
            block.scaled = False  # a loss scaler reads values, and fake tensors have none
            prepare(blocks, config, torch.device("cpu"))
            message = fake_message(shapes_of(task.example))
            tracker, work = MemoryTracker(), WorkCounter(speed)
            tracker.add(message.tensors(), "activations")
            self.batch = tracker.live_bytes
            with ExitStack() as stack:
                for each in blocks.learners:
                    stack.enter_context(Followed(tracker, each, {}))
                stack.enter_context(tracker)
                stack.enter_context(work)
                # Two steps: only the second has optimizer state from its start.
                for sequence in range(2):
                    arriving = replace(message, sequence=sequence)
                    if encoder is not None:
                        arriving = encoder.encode(arriving)
                    if sequence == 0:
                        block.local_step(arriving)
                    else:
                        self.fixed = tracker.live_bytes
                        self._trace(block, arriving, tracker, work)
                    if encoder is not None:
                        encoder.learn(update=True)

    def _trace(self, block: Block, message: Message, tracker: MemoryTracker, work: WorkCounter) -> None:
        watch = _UnitWatch(self.units, tracker, work)
        assert block.optimizer is not None
        with ExitStack() as stack:
            block.observers.append(watch)
            stack.callback(block.observers.remove, watch)
            stack.callback(block.optimizer.register_step_pre_hook(watch.update_started).remove)
            block.local_step(message)
        self.messages = watch.messages
        self.head = EndCost(0, watch.head.backward, watch.head.gradients, watch.head.seconds)


class _UnitWatch(Observer):
    """Divides the bytes and the time of one local step among the units and the head.

    ``_current`` is the cost that the backward pass is in; it starts with the head's.
    """

    def __init__(self, units: Sequence[UnitCost], tracker: MemoryTracker, work: WorkCounter) -> None:
        self.units, self.tracker, self.work = units, tracker, work
        self.head = UnitCost()
        self.messages: list[Message] = []
        self._base = {id(cost): 0 for cost in [*units, self.head]}
        self._current, self._started, self._gradients = self.head, 0.0, 0

    def unit_started(self, unit: Unit) -> None:
        self._base[id(self._cost)] = self.tracker.live_bytes
        self._started = self.work.seconds
        self.tracker.reset_peak()

    def unit_ended(self, unit: Unit, output: Message) -> None:
        cost, tracker, work = self._cost, self.tracker, self.work
        live = self._base[id(cost)]
        cost.forward, cost.kept = tracker.peak.bytes - live, tracker.live_bytes - live
        cost.seconds, self._started = work.seconds - self._started, work.seconds
        tensors = output.tensors()
        # By storage: several features may be views of the same memory.
        cost.output = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
        if output.x.requires_grad:
            output.x.register_hook(lambda _: self._enter(cost))  # type: ignore[no-untyped-call]
        self.messages.append(output.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")))
        self._base[id(self.head)] = tracker.live_bytes
        tracker.reset_peak()

    def update_started(self, *_: object) -> None:
        """Backward has ended: close the costs of the unit that it was in."""
        self._enter(UnitCost())

    @property
    def _cost(self) -> UnitCost:
        """The cost of the unit whose forward pass is running."""
        return self.units[len(self.messages)]

    def _enter(self, cost: UnitCost) -> None:
        """The backward pass moves on to ``cost``: close the costs of the unit that it leaves."""
        current, tracker, work = self._current, self.tracker, self.work
        current.backward = tracker.peak.bytes - self._base[id(current)] - self._gradients
        current.gradients = tracker.live["gradients"] - self._gradients
        current.seconds += work.seconds - self._started
        self._current, self._started, self._gradients = cost, work.seconds, tracker.live["gradients"]
        tracker.reset_peak()
