"""Orders: what the first stage of a pipeline has every stage do, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.learning.outcome import Report
from engine.network.message import Message

OrderKind = Literal["train", "evaluate", "score", "save", "stop"]
KINDS: tuple[OrderKind, ...] = get_args(OrderKind)


@dataclass(frozen=True)
class Order:
    """One thing to do, with what it takes; every stage does it and passes it on.

    A run is a sequence of orders. The first stage tells it, from its data, its clock and its signals; later
    stages do what arrives and decide nothing, so that all save, evaluate and stop at the same step. In one
    process the only stage tells itself.

    Args:
        kind: ``train`` on a micro-batch, ``evaluate`` one of test data, ``score`` what has been evaluated,
            ``save`` a checkpoint, ``stop``.
        message: of ``train`` and ``evaluate``.
        reports: of the blocks that a ``train`` order has passed.
        update: whether optimizers step after this micro-batch.
        weight: the micro-batch's share of its batch, times the number of replicas (which average gradients).
    """

    kind: OrderKind
    message: Message | None = None
    reports: tuple[Report, ...] = ()
    update: bool = True
    weight: float = 1.0
