"""Recomputation: backward runs a unit's forward pass again, instead of the unit keeping its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.network.chain import Unit
from engine.network.message import Message

# A loss is a plain function of prediction and targets, so the block cannot hand it a flag. A context variable is local
# to a thread.
_recomputes = ContextVar("recomputes", default=False)


def recomputes() -> bool:
    """Whether the block whose loss is being computed recomputes activations. A large loss may then do the same."""
    return _recomputes.get()


@contextmanager
def recomputing(wanted: bool) -> Iterator[None]:
    """A context in which ``recomputes`` returns ``wanted``."""
    token = _recomputes.set(wanted)
    try:
        yield
    finally:
        _recomputes.reset(token)


def run_recomputed(unit: Unit, message: Message) -> Message:
    """Run a unit so that autograd keeps its input alone; backward recomputes the rest.

    Raises:
        ValueError: the unit changes its input in place, so recomputation would start from a different input.
    """
    version = message.x._version
    # Pass ``x`` separately as well: torch finds the device whose random state it must restore for recomputation by
    # looking at tensor arguments, and does not look inside a message. The reentrant form takes no ``context_fn`` and
    # finds no gradients inside a message.
    result: Message = checkpoint(
        lambda message, _: unit(message),
        message,
        message.x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(unit.module)),
    )
    if message.x._version != version:
        raise ValueError(
            f"unit {unit.name!r} changes its input in place and so cannot be recomputed; set local.recompute none"
        )
    return result


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep recomputation from counting a batch twice in running statistics.

    Switching to evaluation mode would do so too, but would normalise with other statistics than the first pass.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    # With momentum 0 the running averages keep their values, and the counter advances on a copy that is dropped.
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches
