"""Shapes from a forward pass on fake tensors, without arithmetic; where that needs values, on real ones."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from engine.network.message import Message, versions
from engine.utilities.seed import seeded


def infer_shapes(forward: Callable[[Message], Message], message: Message, modules: Iterable[nn.Module]) -> Message:
    """The message that ``forward`` returns for a message shaped like ``message``, as meta tensors.

    If ``forward`` needs the values of tensors (``x.sum() > 0``, ``x[x > 0]``), it runs on random numbers instead, as
    many as ``message`` has.

    Args:
        modules: the modules that ``forward`` runs. They are in evaluation mode meanwhile, so that no statistic changes,
            and keep nothing of this pass (see ``trial``).
    """
    return changes(forward, message, modules)[0]


def changes(
    forward: Callable[[Message], Message], message: Message, modules: Iterable[nn.Module]
) -> tuple[Message, frozenset[str]]:
    """What ``infer_shapes`` returns, and the names of the features of ``message`` that ``forward`` changes in place."""
    # Two nested fake modes refuse each other's tensors, so reuse the caller's if there is one.
    active = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]
    modules = list(modules)
    fake = active[-1] if active else FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with evaluating(modules), trial(modules, fake), fake:
            # Fake tensors on the CPU, not meta tensors: real parameters are on the CPU, and some operators and modules
            # choose their path by the device.
            return _run(forward, message, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
    except Exception as error:
        if active or not needs_values(error):
            raise
    with evaluating(modules), trial(modules), seeded(0, "trial"):
        return _run(forward, message, _made_up)


def _run(
    forward: Callable[[Message], Message], message: Message, make: Callable[[Tensor], Tensor]
) -> tuple[Message, frozenset[str]]:
    with torch.no_grad():
        given = message.map(make)
        result = forward(given)
    changed = frozenset(name for name, value in given.features.items() if any(versions(value)))
    return result.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")), changed


def _made_up(tensor: Tensor) -> Tensor:
    """Random numbers, or zeros, which are valid as indices and labels."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def needs_values(error: BaseException | None) -> bool:
    """Whether an error says that fake tensors, which have no values, do not suffice."""
    if error is None:
        return False
    # An operator without an implementation for fake tensors counts too, and ``numpy()``, which raises by itself.
    own = type(error).__module__ == FakeTensorMode.__module__ or "tensor subclasses" in str(error)
    return own or needs_values(error.__cause__ or error.__context__)


def shapes_of(make: Callable[[], Message]) -> Message:
    """The message that ``make`` returns, as meta tensors; none of its tensors is allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make().map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))


@contextmanager
def trial(modules: Iterable[nn.Module], fake: FakeTensorMode | None = None) -> Iterator[None]:
    """A context for a pass that may fail, under ``fake`` or on real tensors, and leaves no trace, nor on stderr.

    The modules get back the attributes that they had before, also in their dicts, lists, sets and deques. A cache
    could otherwise keep a fake tensor, and a real pass would then compute with a tensor that has no values. They work
    on copies of their parameters and buffers, because an operator could change them in place, even under ``fake``.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints the traceback of errors that it raises
    disabled, log.disabled = log.disabled, True
    kept = [(module, dict(vars(module))) for root in modules for module in root.modules()]
    containers = [value for _, held in kept for value in held.values() if isinstance(value, (dict, list, set, deque))]
    contents = [(value, copy.copy(value)) for value in containers]
    copies: dict[int, Tensor] = {}
    for module, _ in kept:
        tensors: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        for owned in tensors:
            for name, tensor in owned.items():
                if tensor is not None:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor, fake)
                    owned[name] = copies[id(tensor)]
    try:
        yield
    finally:
        log.disabled = disabled
        for module, held in kept:
            vars(module).clear()
            vars(module).update(held)
        for value, content in contents:
            if _identities(value) != _identities(content):  # some frameworks' dicts cannot be changed, nor have they
                value.clear()
                value.update(content) if isinstance(value, (dict, set)) else value.extend(content)


def _copy(tensor: Tensor, fake: FakeTensorMode | None) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.clone()
    if fake is None:
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return tensor if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)  # which takes no memory


def _identities(container: Any) -> list[int]:
    return [id(item) for item in (container.values() if isinstance(container, dict) else container)]


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which ``modules`` are in evaluation mode; on leaving, every module returns to its previous mode."""
    # Per module: train() on leaving would also switch normalisations to training that a task keeps in evaluation mode.
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
