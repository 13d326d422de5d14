"""The one-way pipeline: each rank has a stage of blocks, and orders travel from the first stage to the last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from engine.distributed.order import Order
from engine.distributed.transport import Inbox, Outbox
from engine.learning.schedules.protocol import Schedule


class Pipeline:
    """One rank's stage: its blocks, and the links to the stages before and after it. A single process has no links.

    A stage runs the local steps of its blocks on a message and sends the message on. Nothing ever travels back, so a
    stage waits for a later one only if that one is slower and no slot of the link is free, and batches need no flush
    between them::

        rank 0   0 1 2 3 4 5 ...
        rank 1     0 1 2 3 4 5 ...
        rank 2       0 1 2 3 4 5 ...       numbers: messages

    When message n reaches rank 1, the blocks of rank 1 have finished message n - 1, exactly as in one process. Rank 0
    may be at message n + 1 by then, but no gradient connects the two, so results are bit-identical to those of one
    process.

    Args:
        schedule: the order in which the blocks of this stage run.
        inbox: the link from the stage before; None in the first stage.
        outbox: the link to the next stage; None in the last stage.
    """

    def __init__(self, schedule: Schedule, inbox: Inbox | None = None, outbox: Outbox | None = None) -> None:
        self.schedule, self.inbox, self.outbox = schedule, inbox, outbox

    def orders(self, course: Iterable[Order]) -> Iterator[Order]:
        """Yield all orders up to ``stop``: in the first stage those of ``course``, in others those that arrive."""
        if self.inbox is None:
            yield from course
            return
        while True:
            order = self.inbox.receive()
            yield order
            if order.kind == "stop":
                return

    def run(self, order: Order) -> tuple[Order, Any]:
        """Run an order's message through the blocks of this stage, and send the order on.

        Returns:
            The order as this stage leaves it, and the prediction. In the last stage, a ``train`` order holds the
            reports of all blocks. The prediction is None except for an ``evaluate`` order in the last stage.
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
            self.schedule.settle()  # the link reads the message on the current stream, which may not have made it
            self.outbox.send(order)
        return order, prediction

    def close(self) -> None:
        """Wait until everything has been sent; call this after the order to stop."""
        if self.outbox is not None:
            self.outbox.close()
