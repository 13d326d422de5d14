"""Observers: they learn what a block does while it does it, for memory accounting and for streams."""

from __future__ import annotations

from engine.network.chain import Unit
from engine.network.message import Message


class Observer:
    """Watches one block (``Block.observers``). Every method does nothing until a subclass overrides it.

    One local step makes these calls, in this order::

        started
            unit_started, unit_ended        for every unit
            output_ready                    the message to send is complete and detached
            backward_started
        ended

    If the step fails, no further call follows. Evaluation makes the calls of units alone.
    A shared encoder works in two halves, ``encode`` and ``learn``; ``started`` and ``ended`` enclose each of them.
    """

    def started(self) -> None:
        """A local step begins."""

    def unit_started(self, unit: Unit) -> None:
        """The forward pass of ``unit`` begins. (Recomputation in backward is not reported.)"""

    def unit_ended(self, unit: Unit, output: Message) -> None:
        """The forward pass of ``unit`` has returned ``output``."""

    def output_ready(self) -> None:
        """The message for the next block is complete; backward has not begun."""

    def backward_started(self) -> None:
        """Backward begins."""

    def ended(self, output: Message | None) -> None:
        """The local step has ended; ``output`` is the message for the next block, or None after ``learn``."""
