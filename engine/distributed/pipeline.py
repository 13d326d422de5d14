"""The one-way pipeline: a stage of blocks on each rank, orders from the first stage to the last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from engine.distributed.order import Order
from engine.distributed.transport import Inbox, Outbox
from engine.learning.schedules.sequential import Schedule


class Pipeline:
    """One rank's stage: blocks, and links to the stages before and after; in one process there are no links.

    A stage runs its blocks' local steps on a message and sends it on. Nothing ever comes back, so no stage
    waits for a later one (except for a free slot, when that one is slower), and there is no flush between batches::

        rank 0   0 1 2 3 4 5 ...
        rank 1     0 1 2 3 4 5 ...
        rank 2       0 1 2 3 4 5 ...       numbers: messages

    When message n comes to rank 1, its blocks have been through message n - 1, as they would in one process;
    that rank 0 is at message n + 1 by then is nothing to them. So every bit is the same.

    Args:
        schedule: how the blocks of this stage take turns.
        inbox: the link from the stage before; None in the first.
        outbox: the link to the next stage; None in the last.
    """

    def __init__(self, schedule: Schedule, inbox: Inbox | None = None, outbox: Outbox | None = None) -> None:
        self.schedule, self.inbox, self.outbox = schedule, inbox, outbox

    def orders(self, course: Iterable[Order]) -> Iterator[Order]:
        """The stage's orders up to the one to stop: ``course`` in the first stage, what arrives in the others."""
        if self.inbox is None:
            yield from course
            return
        while True:
            order = self.inbox.receive()
            yield order
            if order.kind == "stop":
                return

    def run(self, order: Order) -> tuple[Order, Any]:
        """Follow an order as far as blocks are concerned, and send it on.

        Returns:
            The order as this stage leaves it (with all reports of a ``train`` order in the last stage), and the
            prediction (of an ``evaluate`` order in the last stage, else None).
        """
        prediction = None
        if order.message is not None and order.kind == "train":
            message, reports = self.schedule.step(order.message, update=order.update, weight=order.weight)
            order = replace(order, message=message, reports=(*order.reports, *reports))
        elif order.message is not None:
            result = self.schedule.predict(order.message)
            if self.outbox is None:
                prediction = result
            else:
                order = replace(order, message=result)
        if self.outbox is not None:
            self.schedule.settle()
            self.outbox.send(order)
        return order, prediction

    def close(self) -> None:
        """See off what is under way, after the order to stop."""
        if self.outbox is not None:
            self.outbox.close()
