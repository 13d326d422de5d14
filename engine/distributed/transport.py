"""Links: they carry orders from one rank to the next, with messages of any shape and type, several at a time."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.distributed.order import KINDS, Order
from engine.distributed.ticket import FORM, TICKET_BYTES, Ticket, pack, transfer_sizes, unpack
from engine.distributed.wire import TENSORS, TICKETS, Wire, Work
from engine.utilities.text import described

POLL_SECONDS = 0.2  # a wait wakes up this often, to notice an error of its threads and to let Python handle signals


class LinkError(RuntimeError):
    """A link failed, or its other end gave no sign of life. The message names both ranks and the order."""


class Outbox:
    """The sending end of a link.

    An order takes one ticket of 1 KiB, which carries number, kind and sequence, and then its tensors: small ones
    joined, large ones each on their own. The structure (nesting, shapes, types, and values that are not tensors) is
    sent only when it differs from that of the message before: inside the ticket if it fits, otherwise in a transfer of
    its own. While shapes repeat, it costs nothing::

        send() -> at most `depth` orders -> thread: start transfers -> thread: wait for their end, free a slot

    Starting and finishing need two threads, because a transfer ends only when the other rank takes it, and the next one
    must start before that.

    Args:
        wire: leads to the next rank.
        names: this rank and the next, for errors.
        depth: orders that may be on their way; ``send`` waits for a free slot, so that memory stays bounded.
        timeout: seconds that ``send`` waits before it gives up.
    """

    def __init__(self, wire: Wire, names: tuple[int, int], *, depth: int = 2, timeout: float = 300.0) -> None:
        self.train_bytes = 0  # bytes sent so far for training
        self._wire, self._names, self._depth, self._timeout = wire, names, depth, timeout
        self._slots = threading.Semaphore(depth)
        self._number, self._header = 0, b""
        self._error: BaseException | None = None
        self._stream = _side_stream(wire.device)
        self._waiting: queue.Queue[tuple[Tensor, list[Tensor], Any] | None] = queue.Queue()
        self._under_way: queue.Queue[tuple[list[Work], Any] | None] = queue.Queue()
        self._threads = [_thread(self._start, self._stream), _thread(self._finish, self._stream)]

    def send(self, order: Order) -> None:
        """Send an order. Its tensors must not change afterwards, because the transfer reads them later.

        Raises:
            LinkError: the link broke, or no slot became free within ``timeout``.
        """
        self._wait_for_slot()
        tensors, size, header, repeated = pack(order, self._wire.device, self._header)
        if size >= 0:
            self._header = header
        content = b"" if repeated or size < 0 else header
        message = order.message
        ticket = Ticket(
            self._number,
            KINDS.index(order.kind),
            message.sequence if message else 0,
            order.update,
            order.weight,
            len(content),
            size,
        )
        buffer = torch.zeros(TICKET_BYTES, dtype=torch.uint8)
        start = FORM.pack(*ticket)
        if len(start) + len(content) <= TICKET_BYTES:
            start += content
        else:
            tensors.insert(0, torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._wire.device))
        buffer[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        self._number += 1
        if order.kind == "train":
            self.train_bytes += TICKET_BYTES + sum(tensor.nbytes for tensor in tensors)
        self._waiting.put((buffer, tensors, _now_on(self._wire.device)))

    def close(self) -> None:
        """Wait until everything has been sent; call this after the order to stop.

        Raises:
            LinkError: as ``send``.
        """
        # The other end always asks for ``depth`` tickets in advance. Blank tickets answer those that it still expects
        # after the order to stop, because no receive may be pending when the process group is destroyed.
        blank = torch.zeros(TICKET_BYTES, dtype=torch.uint8)
        for _ in range(self._depth - 1):
            self._wait_for_slot()
            self._waiting.put((blank, [], None))
        # When all slots are free, every transfer has ended.
        for _ in range(self._depth):
            self._wait_for_slot()
        self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _wait_for_slot(self) -> None:
        began = time.monotonic()
        while not self._slots.acquire(timeout=POLL_SECONDS):
            self._raise()
            if time.monotonic() - began > self._timeout:
                raise LinkError(
                    f"rank {self._names[0]} waited {self._timeout:.0f} s for rank {self._names[1]} to take order "
                    f"{self._number - self._depth}; if it was only slow, raise placement.timeout"
                )
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise LinkError(
                f"rank {self._names[0]}: the link to rank {self._names[1]} broke ({described(self._error)})"
            ) from self._error

    def _start(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                ticket, tensors, ready = item
                # Transfers run on a stream of their own, so the tensors must be computed before a transfer reads them.
                if ready is not None:
                    ready.synchronize()
                works = [self._wire.send(ticket, TICKETS)]
                works += [self._wire.send(tensor, TENSORS) for tensor in tensors]
                self._under_way.put((works, (ticket, tensors)))  # keeps the tensors alive until they are sent
        except Exception as error:  # raised in the rank's own thread, at its next call
            self._error = error
        self._under_way.put(None)

    def _finish(self) -> None:
        try:
            while (item := self._under_way.get()) is not None:
                for work in item[0]:
                    work.wait()
                if self._stream is not None:
                    self._stream.synchronize()
                del item  # free the tensors before the slot, or ``depth`` would not bound memory
                self._slots.release()
        except Exception as error:
            self._error = error


class Inbox:
    """The receiving end of a link.

    It asks for tickets ``depth`` orders ahead, and for tensors as soon as their ticket has told their shapes and a slot
    is free, so that they travel while the rank computes::

        thread: tickets -> buffer for `depth` orders -> ask for tensors -> thread: wait until they arrive -> receive()

    Args:
        wire: comes from the rank before.
        names: this rank and the one before, for errors.
        device: where the messages must arrive.
        depth: as at the other end.
        timeout: seconds that ``receive`` waits before it gives up.
    """

    def __init__(
        self, wire: Wire, names: tuple[int, int], device: torch.device, *, depth: int = 2, timeout: float = 300.0
    ) -> None:
        self._wire, self._names, self._device, self._depth, self._timeout = wire, names, device, depth, timeout
        self._slots = threading.Semaphore(depth)
        self._number = 0
        self._structure: Any = None
        self._stream = _side_stream(wire.device, device)
        self._arriving: queue.Queue[tuple[Ticket, Any, list[Tensor], list[Work]] | None] = queue.Queue()
        self._arrived: queue.Queue[Order | BaseException] = queue.Queue()
        _thread(self._ask, self._stream)
        _thread(self._take, self._stream)

    def receive(self) -> Order:
        """Wait for the next order and return it.

        Raises:
            LinkError: the link broke, something other than the next order arrived, or nothing arrived within
                ``timeout``.
        """
        began = time.monotonic()
        while True:
            try:
                order = self._arrived.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if time.monotonic() - began > self._timeout:
                    raise LinkError(
                        f"rank {self._names[0]} waited {self._timeout:.0f} s for order {self._number} of rank "
                        f"{self._names[1]}; if it was only slow, raise placement.timeout"
                    ) from None
        if isinstance(order, BaseException):
            cause = str(order) if isinstance(order, LinkError) else f"broke ({described(order)})"
            raise LinkError(f"rank {self._names[0]}: the link from rank {self._names[1]} {cause}") from order
        self._number += 1
        self._slots.release()
        if self._stream is not None and order.message is not None:
            # The link's stream allocated these tensors. Without this, the allocator could reuse their memory as soon as
            # they are dropped, while the rank's own stream still has to read them.
            read = [tensor for report in order.reports for tensor in (report.loss, report.gradient_norm)]
            for tensor in [*order.message.tensors(), *read]:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return order

    def _ask(self) -> None:
        number = 0
        try:
            posted = deque(self._ask_ticket() for _ in range(self._depth))
            while True:
                buffer, work = posted.popleft()
                work.wait()
                content = bytes(buffer.numpy())  # tickets are always on the CPU
                ticket = Ticket(*FORM.unpack_from(content))
                if ticket.number != number or not 0 <= ticket.kind < len(KINDS):
                    raise LinkError(f"brought order {ticket.number} of kind {ticket.kind}, order {number} expected")
                number += 1
                self._slots.acquire()  # before any buffer is allocated, so that ``depth`` bounds memory here as well
                self._arriving.put(self._ask_tensors(ticket, content))
                if KINDS[ticket.kind] == "stop":
                    for _, work in posted:  # the blank tickets of ``Outbox.close``
                        work.wait()
                    return
                posted.append(self._ask_ticket())
        except Exception as error:
            self._arriving.put(None)
            self._arrived.put(error)

    def _ask_ticket(self) -> tuple[Tensor, Work]:
        buffer = torch.empty(TICKET_BYTES, dtype=torch.uint8)
        return buffer, self._wire.receive(buffer, TICKETS)

    def _ask_tensors(self, ticket: Ticket, content: bytes) -> tuple[Ticket, Any, list[Tensor], list[Work]]:
        if ticket.header:
            if FORM.size + ticket.header <= TICKET_BYTES:
                header = content[FORM.size : FORM.size + ticket.header]
            else:
                buffer = torch.empty(ticket.header, dtype=torch.uint8, device=self._wire.device)
                self._wire.receive(buffer, TENSORS).wait()
                header = bytes(buffer.cpu().numpy())
            self._structure = pickle.loads(header)  # written by a rank of this job (see ``ticket.pack``)
        if ticket.bytes < 0:
            return ticket, self._structure, [], []
        sizes, total = transfer_sizes(self._structure)
        if total != ticket.bytes:
            raise LinkError(f"brought {ticket.bytes} bytes for order {ticket.number}, its structure has {total}")
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._wire.device) for size in sizes]
        return ticket, self._structure, buffers, [self._wire.receive(buffer, TENSORS) for buffer in buffers]

    def _take(self) -> None:
        try:
            while (item := self._arriving.get()) is not None:
                ticket, structure, buffers, works = item
                for work in works:
                    work.wait()
                order = unpack(ticket, structure, buffers, self._device)
                if self._stream is not None:
                    self._stream.synchronize()
                # Locals would keep the last message alive while the thread waits for the next one.
                del item, buffers, works
                self._arrived.put(order)
                if order.kind == "stop":
                    return
                del order
        except Exception as error:
            self._arrived.put(error)


def _side_stream(*devices: torch.device) -> torch.cuda.Stream | None:
    """A stream for transfers, so that waiting for a transfer does not wait for the rank's own work; None on CPUs."""
    cuda = [device for device in devices if device.type == "cuda"]
    return torch.cuda.Stream(cuda[0]) if cuda else None  # type: ignore[no-untyped-call]


def _thread(target: Callable[[], None], stream: torch.cuda.Stream | None) -> threading.Thread:
    def run() -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            target()

    # A daemon, because a thread that waits for a rank that is gone must not keep this process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _now_on(device: torch.device) -> Any:
    """An event that happens when the device has finished everything queued so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
