"""Shapes without arithmetic: run a forward pass on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from engine.network.message import Message


def infer_shapes(forward: Callable[[Message], Message], message: Message, modules: Iterable[nn.Module]) -> Message:
    """The message that ``forward`` makes of one shaped like ``message``, as meta tensors.

    Args:
        modules: those that ``forward`` runs; in evaluation mode meanwhile, and no statistic changes.
    """
    active = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]
    fake = active[-1] if active else FakeTensorMode(allow_non_fake_inputs=True)
    with evaluating(modules):
        with fake, torch.no_grad():
            result = forward(message.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")))
        return result.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))


def shapes_of(make: Callable[[], Message]) -> Message:
    """The message that ``make`` makes, as meta tensors; nothing of its size is allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make().map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in, frozen normalisations included."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
