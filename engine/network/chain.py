"""A network as a chain of named units, exact down to the last parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.network.message import Message
from engine.network.shapes import infer_shapes

Forward = Callable[[nn.Module, Message], Message]


def apply_to_x(module: nn.Module, message: Message) -> Message:
    """The forward of most units: ``module`` maps ``x`` to ``x``, all else passes by."""
    return message.with_x(module(message.x))


@dataclass(frozen=True)
class Unit:
    """The smallest piece a cut never divides.

    Args:
        name: shown in tables and used in ``local.cut``.
        module: holds the unit's parameters. It may be a part of the model as it is, or a new
            ``nn.Sequential`` around several parts: names are found by identity, in the model.
        forward: ``forward(module, message) -> message``. The module is an argument, so that the same
            forward runs a copy of the unit inside an auxiliary network.
        stage: units of equal stage work at one resolution and width; GLCAN takes its local part from
            each stage still to come. If any unit has one, those without (a neck) are in no local part.
        conditioned: whether it reads what the chain's shared encoder makes, which learns through it: a block of such
            units has something to train even if they are frozen.
    """

    name: str
    module: nn.Module
    forward: Forward = apply_to_x
    stage: str = ""
    conditioned: bool = False

    def __call__(self, message: Message) -> Message:
        return self.forward(self.module, message)

    def copy(self) -> Unit:
        """The same architecture with weights of its own, drawn from torch's random state.

        Every parameter's elements are shuffled, so a copy follows the very distribution its framework
        initialised the original with, constants (a normalisation's ones) included, whatever the
        framework. Normalisation statistics start afresh, and every parameter learns.

        Known limitations: an initialisation with structure (orthogonal rows) keeps only its marginals; of
        a trained unit it is the trained weights' distribution that is drawn from.
        """
        memo: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in self.module.buffers()}
        for parameter in self.module.parameters():
            values = parameter.detach().flatten()
            order = torch.randperm(len(values), device=values.device)
            memo[id(parameter)] = nn.Parameter(values[order].view_as(parameter))
        module = copy.deepcopy(self.module, memo).train()  # a frozen normalisation has no statistics now
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._NormBase):
                child.reset_running_stats()
        return replace(self, module=module)


class Chain:
    """The units of a model in order, then its head; every parameter and buffer is in exactly one.

    Args:
        model: the network as its framework made it. Its ``state_dict`` names are the names used in
            checkpoints and exports; its source is not touched.
        units: in the order of the forward pass; a cut falls between two of them.
        head: maps the last unit's message to the prediction (in ``x``). It stays with the last block.
        example: a message as the first unit gets it (any batch size of at least 2), for shapes.
        layout: order of the axes of ``x`` between units: ``NCHW``, ``NHWC`` or ``NLC`` (tokens).
        shared: an encoder of what several units read (a style, a prompt). It runs before the first unit and adds
            tensors to the message's features, which stay in it; it learns from all blocks (see
            ``engine.learning.shared``).
        shared_names: the features it adds.

    Raises:
        ValueError: names are repeated, or a parameter or buffer is in no unit or in several (named).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> chain = Chain(model, [Unit("hidden", model[:2])], Unit("output", model[2]),
        ...               Message({"x": torch.zeros(2, 4)}), layout="NLC")
        >>> chain.names(chain.units[0].module)
        ['0.weight', '0.bias']
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        head: Unit,
        example: Message,
        layout: str = "NCHW",
        shared: Unit | None = None,
        shared_names: Sequence[str] = (),
    ) -> None:
        if layout not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"layout {layout!r} is none of NCHW, NHWC, NLC")
        self.model, self.units, self.head, self.example, self.layout = model, list(units), head, example, layout
        assert (shared is None) == (not shared_names), "a shared encoder, and the features it adds"
        self.shared, self.shared_names = shared, tuple(shared_names)
        self._shapes: list[Message] | None = None

        self.check()

    def check(self) -> None:
        """See that the chain is exact (again: moving a model replaces buffers)."""
        _check_exact(self.model, [*([self.shared] if self.shared else []), *self.units, self.head])

    def __len__(self) -> int:
        return len(self.units)

    def names(self, *modules: nn.Module) -> list[str]:
        """The model's own names of the parameters and persistent buffers in ``modules``."""
        wanted = {id(tensor) for module in modules for tensor in _tensors(module)}
        return [name for name, tensor in self.model.state_dict(keep_vars=True).items() if id(tensor) in wanted]

    def index(self, name: str) -> int:
        """Position of the unit called ``name``.

        Raises:
            ValueError: no unit is called so; the message names the units there are.
        """
        names = [unit.name for unit in self.units]
        if name not in names:
            raise ValueError(f"local.cut: {name!r} is not a unit of this network; its units are {', '.join(names)}")
        return names.index(name)

    def shapes(self) -> list[Message]:
        """The message after each unit, as meta tensors: shapes and dtypes without the arithmetic."""
        if self._shapes is None:
            message, self._shapes = self.example, []
            if self.shared is not None:
                message = infer_shapes(self.shared, message, [self.shared.module])
            for unit in self.units:
                message = infer_shapes(unit, message, [unit.module])
                self._shapes.append(message)
        return self._shapes

    def __call__(self, message: Message) -> Tensor:
        """The plain forward pass of the whole network."""
        if self.shared is not None:
            message = self.shared(message)
        for unit in self.units:
            message = unit(message)
        return self.head(message).x


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return module.state_dict(keep_vars=True).values()


def _check_exact(model: nn.Module, units: Sequence[Unit]) -> None:
    seen: set[str] = set()
    for unit in units:
        if unit.name in seen:
            raise ValueError(f"two units are called {unit.name!r}")
        seen.add(unit.name)
    names = {id(tensor): name for name, tensor in model.named_parameters()}  # frozen ones may not be in the state
    names |= {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    holders: dict[int, str] = {}
    for unit in units:
        for tensor in {id(tensor) for tensor in _tensors(unit.module)}:
            if tensor in holders:
                name = names.get(tensor, "a tensor")
                raise ValueError(f"{name!r} is in two units, {holders[tensor]!r} and {unit.name!r}")
            holders[tensor] = unit.name
    for tensor, name in names.items():
        if tensor not in holders:
            raise ValueError(f"{name!r} of the model is in no unit")
