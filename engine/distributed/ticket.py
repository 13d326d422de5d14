"""How an order becomes bytes: a ticket, the structure of its message, and tensors, small ones joined."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.distributed.order import KINDS, Order
from engine.learning.outcome import Report
from engine.network.message import Message, flatten, specs, unflatten

TICKET_BYTES = 1024  # a fixed size, so that the receiver can ask for tickets before it knows what they hold
SMALL_BYTES = 16 * 1024  # tensors up to this size are joined, because the latency of a transfer outweighs their bytes
ALIGNMENT = 16  # of joined tensors: views of any type, up to complex128, must start at a multiple of their size


class Ticket(NamedTuple):
    """The first, small transfer of every order.

    ``header`` is the length of the pickled structure in bytes, or 0 if the structure is that of the previous message.
    ``bytes`` is the total size of the tensors that follow, or -1 if the order has no message.
    """

    number: int
    kind: int
    sequence: int
    update: int
    weight: float
    header: int
    bytes: int


FORM = struct.Struct("<qqqqdqq")


def pack(order: Order, device: torch.device, last: bytes) -> tuple[list[Tensor], int, bytes, bool]:
    """Turn an order into tensors of bytes on ``device``.

    Args:
        last: the header of the previous message.

    Returns:
        The tensors to send, their total size (-1 without a message), the header that describes their structure, and
        whether it equals ``last``.
    """
    if order.message is None:
        return [], -1, b"", True
    reports = [(r.block, r.loss, r.gradient_norm, r.skipped) for r in order.reports]
    tensors, structure = flatten(_once((order.message.parts(), reports)))
    header = pickle.dumps(structure)  # read by ranks of this job only; files are never unpickled
    small, large = [], []
    for tensor, spec in zip(tensors, specs(structure), strict=True):
        raw = spec.to_bytes(tensor).to(device)
        if raw.numel() > SMALL_BYTES:
            large.append(raw)
        elif raw.numel():
            small += [raw, raw.new_zeros(-raw.numel() % ALIGNMENT)]
    # Small tensors are copied by the join. Large ones are sent from their own memory, so nothing may change them before
    # they are gone.
    sent = [*([torch.cat(small)] if small else []), *large]
    return sent, sum(tensor.numel() for tensor in sent), header, header == last


def transfer_sizes(structure: Any) -> tuple[list[int], int]:
    """The size of each transfer (small tensors joined, then each large one) and of all together, in bytes."""
    sizes = [spec.nbytes for spec in specs(structure)]
    small = sum(size + -size % ALIGNMENT for size in sizes if size <= SMALL_BYTES)
    large = [size for size in sizes if size > SMALL_BYTES]
    transfers = [*([small] if small else []), *large]
    return transfers, sum(transfers)


def unpack(ticket: Ticket, structure: Any, buffers: list[Tensor], device: torch.device) -> Order:
    """The inverse of ``pack``: an order on ``device``, from buffers with the sizes of ``transfer_sizes``."""
    kind = KINDS[ticket.kind]
    if ticket.bytes < 0:
        return Order(kind, update=bool(ticket.update), weight=ticket.weight)
    arrived = [buffer.to(device) for buffer in buffers]
    expected = specs(structure)
    joined = arrived.pop(0) if any(0 < spec.nbytes <= SMALL_BYTES for spec in expected) else None
    large, at, tensors = iter(arrived), 0, []
    for spec in expected:
        if spec.nbytes > SMALL_BYTES:
            raw = next(large)
        elif spec.nbytes:
            assert joined is not None
            raw = joined[at : at + spec.nbytes]
            at += spec.nbytes + -spec.nbytes % ALIGNMENT
        else:
            raw = torch.empty(0, dtype=torch.uint8, device=device)
        tensors.append(spec.from_bytes(raw))
    tree = unflatten(tensors, structure)
    parts, reports = pytree.tree_map_only(Same, lambda same: tensors[same.tensor], tree)
    message = Message.of(parts, ticket.sequence)
    # Reports are kept until their losses are logged. Without copies, each would keep the whole joined buffer alive.
    own = tuple(Report(block, loss.clone(), norm.clone(), skipped) for block, loss, norm, skipped in reports)
    return Order(kind, message, own, bool(ticket.update), ticket.weight)


@dataclass(frozen=True)
class Same:
    """Stands for a tensor that occurred before: tensors that share memory when sent must share it on arrival."""

    tensor: int


def _once(tree: Any) -> Any:
    """The tree with each further occurrence of a tensor replaced by ``Same``."""
    seen: dict[Any, int] = {}

    def first(tensor: Tensor) -> Tensor | Same:
        key: Any = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if tensor.numel() and key in seen:
            return Same(seen[key])
        # Empty tensors all have the address 0, so each gets a key of its own.
        seen[key if tensor.numel() else len(seen)] = len(seen)
        return tensor

    return pytree.tree_map_only(Tensor, first, tree)
