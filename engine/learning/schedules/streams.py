"""Blocks on CUDA streams of one device: a block's backward overlaps the next block's forward."""

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
"""Number of steps that are timed with streams, and then on one stream, to report what streams gain."""


class Stream(Protocol):
    """A queue of work on a device."""

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> Any: ...


class HostStream:
    """A stand-in on a CPU, where an operator has finished by the time its call returns."""

    def wait_event(self, event: Any) -> None:
        """Return at once: the event has already happened."""

    def record_event(self) -> Any:
        return None


class _Noted(Observer):
    """Records an event when a block's message is ready, so that the next block need not wait for backward."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.event = stream, None

    def output_ready(self) -> None:
        self.event = self._stream.record_event()


class Streams(Sequential):
    """Each block has a stream of its own, and hands its message over as soon as its forward pass is done::

        stream of block 0   F B U F B U F B U
        stream of block 1     F B U F B U F B U
        stream of block 2       F B U F B U F B U        F forward, B backward, U update

    A stream runs the steps of its block in order and waits for the tensors it reads, so results are bit-identical to
    those of ``Sequential``. Activations of several blocks are alive at a time, so it takes more memory. Overlapping is
    faster only where the kernels of one block leave the device idle; after some early steps, a line reports the gain.

    Args:
        streams: one stream per block. By default these are CUDA streams, or stand-ins on a CPU, where nothing overlaps.

    Known limitations: an fp16 loss scaler makes the host wait at every update, so that little overlaps.

    Raises:
        ValueError: at a step, if a block changes its input in place while the block before may still read it.
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
            console.print("local.schedule streams: a CPU has no streams, so nothing is gained over sequential")

    def _new_stream(self) -> Stream:
        return torch.cuda.Stream(self._device) if self._cuda else HostStream()  # type: ignore[no-untyped-call]

    def _on(self, stream: Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext()

    def _caller(self) -> Stream:
        return torch.cuda.current_stream(self._device) if self._cuda else HostStream()

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, list[Report]]:
        reports, streams = [], self._trial()
        # The first block must wait for the copy of the batch to the device, which runs on the caller's stream.
        ready = self._caller().record_event()
        for block, stream in zip(self.blocks, streams, strict=True):
            with self._on(stream):
                stream.wait_event(ready)
                self._keep(message)
                noted = _Noted(stream)
                block.observers.append(noted)  # stays there after a failure, which ends the job
                # ``x`` shares memory with the output of the block before, whose backward may be running on its own
                # stream. autograd's check cannot see a change that comes after the host has queued that backward.
                arrived, version = message.x, message.x._version
                with recording(self.recorder, block.index, "train", message.sequence):
                    message, report = block.local_step(message, update=update, weight=weight)
                block.observers.remove(noted)
                if arrived._version != version and block is not self.blocks[0]:
                    raise ValueError(
                        f"local.schedule: block {block.index} changes its input in place, which the block before may "
                        "still read on its stream; use sequential, or another local.cut"
                    )
                ready = noted.event  # after this block's forward, not after its backward
            reports.append(report)
        return message, reports

    def _keep(self, message: Message) -> None:
        """Tell the allocator that the current stream reads tensors that another stream made.

        Otherwise it could reuse their memory as soon as the host drops them, while this stream still has to read them.
        """
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
        """The streams of the next step, and the trial that reports what streams gain::

            steps   1 to 4          5 to 9                 10 to 14               from 15 on
                    warm-up         timed, with streams    timed, on one stream   with streams

        The last column begins with the report, at the start of step 15.
        """
        self._steps += 1
        start, middle, end = TRIAL_STEPS, 2 * TRIAL_STEPS, 3 * TRIAL_STEPS
        if not self._cuda or self._steps > end:
            return self.streams
        if self._steps in (start, middle, end):
            torch.cuda.synchronize(self._device)  # the host only queues work; without this its clock would time that
            now = time.perf_counter()
            if self._steps == middle:
                self._took = now - self._began
            if self._steps == end:
                gain = (now - self._began) / self._took
                verdict = "" if gain > 1.02 else "; they gain nothing here, and sequential takes less memory"
                console.print(f"local.schedule streams: {gain:.2f} times as fast as one stream{verdict}")
            self._began = now
        return [self.streams[0]] * len(self.blocks) if middle <= self._steps < end else self.streams
