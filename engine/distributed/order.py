"""Orders: what the first stage of a pipeline tells every stage to do, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.learning.outcome import Report
from engine.network.message import Message

OrderKind = Literal["train", "evaluate", "score", "save", "stop"]
KINDS: tuple[OrderKind, ...] = get_args(OrderKind)


@dataclass(frozen=True)
class Order:
    """One thing to do, with everything it needs; every stage carries it out and passes it on.

    A run is a sequence of orders. The first stage issues them, from its data and its signals. Later stages carry out
    what arrives and decide nothing, so that all stages save, evaluate and stop at the same step. In a single process,
    the only stage issues and carries out the orders.

    Args:
        kind: ``train`` on a micro-batch, ``evaluate`` a micro-batch of test data, ``score`` everything evaluated so
            far, ``save`` a checkpoint, or ``stop``.
        message: the micro-batch to ``train`` on or to ``evaluate``.
        reports: the reports of the blocks that a ``train`` order has passed.
        update: whether the optimizers step after this micro-batch.
        weight: the micro-batch's share of its batch, times the number of replicas, because replicas average gradients.
    """

    kind: OrderKind
    message: Message | None = None
    reports: tuple[Report, ...] = ()
    update: bool = True
    weight: float = 1.0
