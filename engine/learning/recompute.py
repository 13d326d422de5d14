"""Recomputation: backward runs a unit's forward pass again, instead of the unit keeping its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.learning.outcome import Refusal
from engine.network.chain import Unit
from engine.network.message import Message, versions

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
    """Run a unit so that autograd keeps only its input; backward recomputes the rest.

    Raises:
        Refusal: the unit changes its input in place, so recomputation would start from a different input.
    """
    before = versions(message.features)
    state = _State(unit.module)
    # Pass ``x`` separately as well: torch finds the device whose random state it must restore for recomputation by
    # looking at tensor arguments, and does not look inside a message. The reentrant form takes no ``context_fn`` and
    # finds no gradients inside a message.
    result: Message = checkpoint(
        lambda message, _: unit(message),
        message,
        message.x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), state.as_before()),
    )
    state.keep_changed()
    if versions(message.features) != before:
        raise Refusal(changes_input(unit))
    return result


def changes_input(unit: Unit) -> str:
    """What a user is told of a unit that cannot be recomputed."""
    return f"unit {unit.name!r} changes its input in place and so cannot be recomputed; set local.recompute none"


class _State:
    """What a module's forward pass changes besides its output, as it was before: buffers and plain attributes.

    Recomputation starts from this state, since the output may depend on it (the vectors of ``spectral_norm``), and
    leaves the module as it found it, so that nothing is counted twice (the statistics of a normalisation, a counter).
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [
            (owner, name, buffer, buffer._version, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.plain = [(owner, _plain(owner)) for owner in module.modules()]

    def keep_changed(self) -> None:
        """Drop what the forward pass has left as it was."""
        self.buffers = [
            (owner, name, buffer, version, copy)
            for owner, name, buffer, version, copy in self.buffers
            # The operator behind BatchNorm changes its statistics without counting a version.
            if isinstance(owner, nn.modules.batchnorm._NormBase)
            or owner._buffers.get(name) is not buffer
            or buffer._version != version
        ]
        self.plain = [
            (owner, {name: value for name, value in before.items() if vars(owner).get(name) is not value})
            for owner, before in self.plain
            if _plain(owner) != before
        ]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """A context in which the module has this state again."""
        buffers = [(owner, name, owner._buffers.get(name)) for owner, name, *_ in self.buffers]
        plain = [(owner, {name: vars(owner).get(name) for name in before}) for owner, before in self.plain]
        for owner, name, *_, copy in self.buffers:
            owner._buffers[name] = copy
        for owner, before in self.plain:
            vars(owner).update(before)
        try:
            yield
        finally:
            for owner, name, after in buffers:
                owner._buffers[name] = after
            for owner, now in plain:
                vars(owner).update(now)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers or text, such as counters."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
