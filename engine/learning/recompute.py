"""Recomputation: run a unit's forward pass again in backward instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.network.chain import Unit
from engine.network.message import Message

_recomputes = ContextVar("recomputes", default=False)


def recomputes() -> bool:
    """Whether the block whose loss is being computed recomputes activations, so that a large loss may do so too."""
    return _recomputes.get()


@contextmanager
def recomputing(wanted: bool) -> Iterator[None]:
    """A context in which ``recomputes`` answers ``wanted``."""
    token = _recomputes.set(wanted)
    try:
        yield
    finally:
        _recomputes.reset(token)


def run_recomputed(unit: Unit, message: Message) -> Message:
    """The unit's output, of which backward keeps the input alone and recomputes the rest.

    Raises:
        ValueError: the unit changes its input in place, so recomputation would start from another input.
    """
    version = message.x._version
    # The tensor is an argument of its own so that torch sees its device and keeps that one's random state:
    # inside a message it would not look.
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
    """Keep recomputation from counting a batch twice in normalisation statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches
