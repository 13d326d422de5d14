"""Observers: told what a block does while it does it, as memory accounting and streams want to know."""

from __future__ import annotations

from engine.network.chain import Unit
from engine.network.message import Message


class Observer:
    """Watches one block (``Block.observers``). Every method does nothing until a subclass overrides it.

    The calls of one local step, in order::

        started
            unit_started, unit_ended        of every unit
            output_ready                    the message to send is there, detached
            backward_started
        ended

    A shared encoder's two halves, ``encode`` and ``learn``, are each enclosed by ``started`` and ``ended``.
    """

    def started(self) -> None:
        """A local step begins."""

    def unit_started(self, unit: Unit) -> None:
        """The forward pass of ``unit`` begins. (Recomputation in backward is not reported.)"""

    def unit_ended(self, unit: Unit, output: Message) -> None:
        """The forward pass of ``unit`` has made ``output``."""

    def output_ready(self) -> None:
        """The message for the next block is complete; backward has not begun."""

    def backward_started(self) -> None:
        """Backward begins."""

    def ended(self, output: Message | None) -> None:
        """The local step has ended with ``output``, the message for the next block (None after ``learn``)."""
