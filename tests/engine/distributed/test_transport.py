"""Links: whatever is sent arrives as it was, in order, or an error says what is wrong; nothing piles up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.order import Order
from engine.distributed.ticket import TICKET_BYTES
from engine.distributed.transport import Inbox, LinkError, Outbox
from engine.distributed.wire import TENSORS, TICKETS, GroupWire, Work
from engine.learning.outcome import Report
from engine.network.bank import FeatureBank
from engine.network.message import Message
from engine.utilities.device import resident_bytes
from tests.ranks import run_ranks, values

CPU = torch.device("cpu")


def link(depth: int = 2, timeout: float = 10.0) -> tuple[Outbox, Inbox, Counted]:
    wire = Counted()
    return (
        Outbox(wire, (0, 1), depth=depth, timeout=timeout),
        Inbox(wire, (1, 0), CPU, depth=depth, timeout=timeout),
        wire,
    )


class Loopback:
    """Both ends of a wire in one process."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._sent: dict[int, queue.Queue[Tensor]] = {TICKETS: queue.Queue(), TENSORS: queue.Queue()}

    def send(self, tensor: Tensor, tag: int) -> Work:
        self._sent[tag].put(tensor.clone())
        return _Done(lambda: None)

    def receive(self, tensor: Tensor, tag: int) -> Work:
        return _Done(lambda: tensor.copy_(self._sent[tag].get()))


@dataclass
class _Done:
    finish: Callable[[], Any]

    def wait(self) -> Any:
        return self.finish()


class Counted(Loopback):
    """A loopback that notes what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, int]] = []

    def send(self, tensor: torch.Tensor, tag: int) -> Any:
        self.sent.append((tag, tensor.nbytes))
        return super().send(tensor, tag)


def message(sequence: int, batch: int = 3, dtype: torch.dtype = torch.float32) -> Message:
    features = {
        "x": torch.randn(batch, 4, 40, 40).to(dtype).to(memory_format=torch.channels_last),
        "skips": [torch.randn(batch, 2, dtype=torch.bfloat16), torch.empty(0, 7)],
        "condition": {"embedding": torch.randn(batch, 5), "flags": torch.tensor([True, False])},
    }
    targets = (torch.arange(batch), {"boxes": torch.randn(2, 4), "name": f"image of {batch}"}, None)
    return Message(features, targets, FeatureBank({0: torch.randn(batch, 6), 2: torch.tensor(1.5)}), sequence)


def same(left: Message, right: Message) -> None:
    ours, theirs = left.tensors(), right.tensors()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    assert (left.sequence, left.features.keys(), list(left.bank)) == (right.sequence, right.features.keys(), [0, 2])
    assert left.targets[1]["name"] == right.targets[1]["name"]


def report(block: int) -> Report:
    return Report(block, torch.tensor(0.5 + block), torch.tensor(float("nan")), 3)


def test_everything_arrives_as_it_was_sent() -> None:
    out, into, _ = link(depth=9)
    sent = [Order("train", message(n, batch), (report(0),), n % 2 == 0, 0.25) for n, batch in enumerate((3, 3, 1, 64))]
    sent += [Order("save"), Order("evaluate", message(0, 2, torch.float16)), Order("score"), Order("stop")]
    for order in sent:
        out.send(order)
    for order in sent:
        arrived = into.receive()
        assert (arrived.kind, arrived.update, arrived.weight) == (order.kind, order.update, order.weight)
        assert (arrived.message is None) == (order.message is None)
        if order.message is not None and arrived.message is not None:
            same(order.message, arrived.message)
        assert [(r.block, float(r.loss), r.skipped) for r in arrived.reports] == [
            (r.block, float(r.loss), r.skipped) for r in order.reports
        ]
    out.close()


def test_a_structure_is_sent_once_while_it_repeats() -> None:
    """A message of one large and many small tensors: a ticket, the small ones joined, the large one."""
    out, into, wire = link(depth=9)
    for number in range(3):
        out.send(Order("train", message(number)))
    for _ in range(3):
        into.receive()
    transfers = len(wire.sent) // 3
    tickets = [size for tag, size in wire.sent if tag == TICKETS]
    assert tickets == [TICKET_BYTES] * 3
    tensors = [size for tag, size in wire.sent if tag == TENSORS]
    large, small = 3 * 4 * 40 * 40 * 4, tensors[1] if tensors[0] > 16384 else tensors[-2]
    assert tensors[-2:] == [small, large], "the later ones have no header"
    assert len(wire.sent) - 3 * 3 in (0, 1), "the first one's header takes at most one transfer"
    assert transfers == 3


def test_what_shares_memory_shares_it_on_the_other_side() -> None:
    """A unit may change its input in place, and a skip that is the same tensor then changes too."""
    out, into, wire = link()
    x = torch.randn(2, 3, 40, 40)
    out.send(Order("train", Message({"x": x, "skip": [x], "empty": [torch.empty(0), torch.empty(0)]})))
    arrived = into.receive().message
    assert arrived is not None
    arrived.x.zero_()
    assert not arrived.features["skip"][0].any()
    assert [size for tag, size in wire.sent if tag == TENSORS] == [x.nbytes], "and it travels once"


def test_a_report_keeps_nothing_alive_of_what_it_came_with() -> None:
    out, into, _ = link()
    out.send(Order("train", message(0), (report(0),)))
    (kept,) = into.receive().reports
    assert kept.loss.untyped_storage().nbytes() == 4


def test_a_long_header_travels_on_its_own() -> None:
    out, into, wire = link()
    names = {"x": torch.ones(2), "names": [f"image {n} of a long list" for n in range(200)]}
    out.send(Order("train", Message(names)))
    arrived = into.receive().message
    assert arrived is not None
    assert arrived.features["names"] == names["names"]
    assert sum(tag == TENSORS for tag, _ in wire.sent) == 2


def test_a_sender_waits_when_nobody_takes() -> None:
    """At most `depth` on each side, whatever the sender would like."""
    out, into, _ = link(depth=2)
    sent = 0

    def send() -> None:
        nonlocal sent
        for number in range(20):
            out.send(Order("train", message(number)))
            sent += 1

    # The loopback's own queue takes everything, so hold it up there.
    taken: list[Order] = []
    wire = out._wire
    assert isinstance(wire, Loopback)
    gate = threading.Semaphore(0)
    real = wire.send

    def slow(tensor: torch.Tensor, tag: int) -> Any:
        if tag == TICKETS:
            gate.acquire()
        return real(tensor, tag)

    wire.send = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert sent == 2
    for number in range(20):
        gate.release()
        taken.append(into.receive())
        assert taken[-1].message is not None
        assert taken[-1].message.sequence == number
    thread.join(10)
    assert sent == 20


def test_who_waits_too_long_says_for_what() -> None:
    out, into, _ = link(timeout=0.3)
    with pytest.raises(LinkError, match=r"rank 1 waited 0 s for order 0 of rank 0; .*raise placement.timeout"):
        into.receive()
    wire = out._wire
    wire.send = lambda tensor, tag: time.sleep(100)  # type: ignore[method-assign]
    for number in range(2):
        out.send(Order("train", message(number)))
    with pytest.raises(LinkError, match="rank 0 waited 0 s for rank 1 to take order 0"):
        out.send(Order("train", message(2)))


def test_what_comes_out_of_turn_is_refused() -> None:
    out, into, _ = link()
    out._number = 5
    out.send(Order("train", message(0)))
    with pytest.raises(LinkError, match="rank 1: the link from rank 0 brought order 5 of kind 0, order 0 expected"):
        into.receive()


def test_what_is_not_as_long_as_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.distributed.transport as module

    out, into, _ = link()
    real = module.pack

    def lie(order: Order, device: torch.device, last: bytes) -> Any:
        tensors, size, header, repeated = real(order, device, last)
        return tensors, size + 8, header, repeated

    monkeypatch.setattr(module, "pack", lie)
    out.send(Order("train", message(0)))
    with pytest.raises(LinkError, match=r"rank 1: the link from rank 0 brought \d+ bytes for order 0, its structure"):
        into.receive()


def test_a_broken_wire_is_heard_at_both_ends() -> None:
    out, _, wire = link()

    def fail(tensor: torch.Tensor, tag: int) -> Any:
        raise RuntimeError("connection closed by peer")

    wire.receive = fail  # type: ignore[method-assign]
    wire.send = fail  # type: ignore[method-assign]
    broken = Inbox(wire, (1, 0), CPU)
    with pytest.raises(LinkError, match="rank 1: the link from rank 0 broke .*connection closed by peer"):
        broken.receive()
    out.send(Order("save"))
    time.sleep(0.1)
    with pytest.raises(LinkError, match="rank 0: the link to rank 1 broke .*connection closed by peer"):
        out.send(Order("save"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_of_all_sorts_through_gloo(ranks: int) -> None:
    assert values(run_ranks(ranks, _relay, 12)) == [12] * ranks


def _relay(count: int) -> int:
    """The first rank makes messages, each next one checks them and passes them on."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    into = None if rank == 0 else Inbox(GroupWire(rank - 1, None, CPU), (rank, rank - 1), CPU)
    out = None if rank == size - 1 else Outbox(GroupWire(rank + 1, None, CPU), (rank, rank + 1))
    good = 0
    for number in range(count):
        torch.manual_seed(number)
        kind = (torch.float32, torch.bfloat16, torch.float64)[number % 3]
        wanted = message(number, (1, 70, 3, 3)[number % 4], kind)
        order = Order("train", wanted) if into is None else into.receive()
        assert order.message is not None
        same(order.message, wanted)
        good += 1
        if out is not None:
            out.send(order)
    stop = Order("stop") if into is None else into.receive()
    assert stop.kind == "stop"
    if out is not None:
        out.send(stop)
        out.close()
    dist.barrier()
    dist.destroy_process_group()
    return good


@pytest.mark.slow
def test_nothing_grows_over_2000_messages_of_varying_shapes() -> None:
    for before, after in values(run_ranks(2, _many, 2000, timeout=400)):
        assert after - before < 8 * 2**20, (before, after)


def _many(count: int) -> tuple[int, int]:
    dist.init_process_group("gloo")
    rank, middle = dist.get_rank(), 0
    into = Inbox(GroupWire(0, None, CPU), (1, 0), CPU) if rank else None
    out = None if rank else Outbox(GroupWire(1, None, CPU), (0, 1))
    for number in range(count):
        if number == count // 4:
            middle = resident_bytes()[0]
        if out is not None:
            out.send(Order("train", message(number, 1 + number % 7)))
        if into is not None:
            into.receive()
    after = resident_bytes()[0]
    if out is not None:
        out.send(Order("stop"))
        out.close()
    if into is not None:
        into.receive()
    dist.barrier()
    dist.destroy_process_group()
    return middle, after
