"""Blocks on CUDA streams of one device: a block's backward runs beside the next block's forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from engine.learning.blocks import Blocks
from engine.learning.observer import Observer
from engine.learning.outcome import Report
from engine.learning.schedules.sequential import Sequential
from engine.network.message import Message
from engine.utilities.console import console
from engine.utilities.recorder import Recorder, recording

TRIAL_STEPS = 5
"""Steps timed with streams, then as many without, to tell what streams gain."""


class Stream(Protocol):
    """A queue of work on a device."""

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> Any: ...


class HostStream:
    """A stand-in on a CPU, where work is done by the time it is queued."""

    def wait_event(self, event: Any) -> None:
        """It has happened."""

    def record_event(self) -> Any:
        return None


class _Noted(Observer):
    """Notes when a block's message is ready: the next block need not wait for backward."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.event = stream, None

    def output_ready(self) -> None:
        self.event = self._stream.record_event()


class Streams(Sequential):
    """Each block has a stream of its own; a message is handed over when its forward pass is done::

        stream of block 0   F B U F B U F B U
        stream of block 1     F B U F B U F B U
        stream of block 2       F B U F B U F B U        F forward, B backward, U update

    Every stream does a block's steps in their order and waits for what it reads, so the bits are those of one
    block after another. Several blocks' activations are alive at a time: it takes more memory than that.
    Overlapping gains something only where one block's kernels leave the device idle; what it gained in some
    early steps is said, once.

    Args:
        streams: one per block; else CUDA's, or stand-ins on a CPU (where nothing overlaps).

    Known limitations: an fp16 loss scaler makes the host wait at every update, so that little overlaps.
    """

    def __init__(
        self, blocks: Blocks, recorder: Recorder | None = None, streams: Sequence[Stream] | None = None
    ) -> None:
        super().__init__(blocks, recorder)
        self._device = blocks[0].device
        self._cuda = self._device.type == "cuda"
        self.streams = list(streams or (self._new_stream() for _ in blocks))
        self._steps, self._began, self._took = 0, 0.0, 0.0
        if not self._cuda:
            console.print("local.schedule streams: a CPU has none, so nothing is gained over sequential")

    def _new_stream(self) -> Stream:
        return torch.cuda.Stream(self._device) if self._cuda else HostStream()  # type: ignore[no-untyped-call]

    def _on(self, stream: Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext()

    def _caller(self) -> Stream:
        return torch.cuda.current_stream(self._device) if self._cuda else HostStream()

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, list[Report]]:
        reports, streams = [], self._trial()
        ready = self._caller().record_event()
        for block, stream in zip(self.blocks, streams, strict=True):
            with self._on(stream):
                stream.wait_event(ready)
                self._keep(message)
                noted = _Noted(stream)
                block.observers.append(noted)
                arrived, version = message.x, message.x._version
                with recording(self.recorder, block.index, "train", message.sequence):
                    message, report = block.local_step(message, update=update, weight=weight)
                block.observers.remove(noted)
                if arrived._version != version and block is not self.blocks[0]:
                    raise ValueError(
                        f"local.schedule: block {block.index} changes its input in place, which the block before may "
                        "still read on its stream; use sequential, or another local.cut"
                    )
                ready = noted.event
            reports.append(report)
        return message, reports

    def _keep(self, message: Message) -> None:
        """Tell the allocator that the current stream reads what another one made."""
        if self._cuda:
            for tensor in message.tensors():
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        for stream in self.streams:
            self._caller().wait_event(stream.record_event())

    def predict(self, message: Message) -> Any:
        self.settle()
        return super().predict(message)

    def _trial(self) -> list[Stream]:
        """The streams of a step: in a trial some early ones run on the first stream alone."""
        self._steps += 1
        start, middle, end = TRIAL_STEPS, 2 * TRIAL_STEPS, 3 * TRIAL_STEPS
        if not self._cuda or self._steps > end:
            return self.streams
        if self._steps in (start, middle, end):
            torch.cuda.synchronize(self._device)
            now = time.perf_counter()
            if self._steps == middle:
                self._took = now - self._began
            if self._steps == end:
                gain = (now - self._began) / self._took
                verdict = "" if gain > 1.02 else ": nothing is gained here, and sequential takes less memory"
                console.print(f"local.schedule streams: {gain:.2f} times as fast as one stream{verdict}")
            self._began = now
        return [self.streams[0]] * len(self.blocks) if middle <= self._steps < end else self.streams
