"""A network as a chain of named units, in which no parameter is missing and none occurs twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from engine.network.message import Message
from engine.network.shapes import changes
from engine.network.state import tensors_of
from engine.utilities.text import described, none_of, place

LAYOUTS = ("NCHW", "NHWC", "NLC")

Forward = Callable[[nn.Module, Message], Message]


def apply_to_x(module: nn.Module, message: Message) -> Message:
    """The forward pass of most units: ``module`` maps ``x`` to a new ``x``; all other features stay as they are."""
    return message.with_x(module(message.x))


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a network that a cut never divides.

    Args:
        name: appears in tables and in ``local.cut``.
        module: holds the unit's parameters. It may be a part of the model, or a new ``nn.Sequential`` around several
            parts: the chain looks up parameters in the model by identity, so wrapping them changes no name.
        forward: ``forward(module, message) -> message``. The module is an argument, so that the same function can run a
            copy of the unit inside an auxiliary network.
        stage: units with the same ``stage`` work at the same resolution and width. GLCAN takes its local part from each
            of the remaining stages. If any unit of a chain has a stage, units without one (a neck) never enter a local
            part.
        conditioned: whether the unit reads features of the chain's shared encoder. The encoder learns through such a
            unit, so a block of conditioned units has something to train even if the units themselves are frozen.
    """

    name: str
    module: nn.Module
    forward: Forward = apply_to_x
    stage: str = ""
    conditioned: bool = False

    def __call__(self, message: Message) -> Message:
        return self.forward(self.module, message)

    def copy(self) -> Unit:
        """A unit of the same architecture with weights of its own, drawn from torch's random state.

        The elements of every parameter are shuffled. The copy therefore follows the distribution from which the
        framework initialised the original, including constants (the ones of a normalisation), whatever the framework.
        Normalisation statistics start fresh, and every parameter is trainable.

        Raises:
            ValueError: Python cannot copy the module, because it holds an open file or a lock, for example.

        Known limitations: of an initialisation with structure (orthogonal rows), only the marginal distribution
        remains. A copy of a trained unit follows the distribution of the trained weights.
        """
        # deepcopy takes what it finds in its memo instead of copying, so this is how the copy gets its own tensors.
        # Frozen parameters become trainable, because nn.Parameter requires gradients by default.
        memo: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in self.module.buffers()}
        for parameter in self.module.parameters():
            values = parameter.detach().flatten()
            order = torch.randperm(len(values), device=values.device)
            memo[id(parameter)] = nn.Parameter(values[order].view_as(parameter))
        # Train even if the original normalises with frozen statistics: those of the copy are reset below, so it must
        # learn its own.
        try:
            module = copy.deepcopy(self.module, memo).train()
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(
                f"unit {self.name!r} cannot be copied for an auxiliary network: {described(error)}; take one without "
                "copies: local.auxiliary greedy or dgl"
            ) from error
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._NormBase):
                child.reset_running_stats()
                child.eps = child.eps or 1e-5  # frozen statistics may do without, but torch trains no layer without
            # The copy may run on a tensor that others need too, and ``infer_shapes`` sees no dropout.
            if isinstance(child, nn.modules.dropout._DropoutNd):
                child.inplace = False
        return replace(self, module=module)


class Chain:
    """The units of a model in order, then its head; every parameter and buffer belongs to exactly one of them.

    Args:
        model: the network as its framework made it. Checkpoints and exports use the names of its ``state_dict``; its
            source is not edited.
        units: the units in the order of the forward pass; a cut falls between two of them.
        head: maps the last unit's message to the prediction, which it leaves in ``x``. It belongs to the last block.
        example: a message as it reaches the first unit, with any batch size of at least 2; it serves to infer shapes.
        layout: order of the axes of ``x`` between units. Maps are ``NCHW`` or ``NHWC``; three axes are tokens (``NLC``)
            and two a flat vector in any layout, so units may differ.
        shared: an encoder of shared conditioning (a style, a prompt), which several units read. It runs before the
            first unit and adds tensors to the message's features, where they stay. It learns from all blocks (see
            ``engine.learning.shared``).
        shared_names: names of the features that ``shared`` adds.

    Raises:
        ValueError: an argument is of another type, two units have the same name, or a parameter or buffer is in no unit
            or in several units, or has no shape yet (in a lazy module). The message names it.

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
        _check_types(model, units, head, example, shared)
        if layout not in LAYOUTS:
            raise ValueError(f"layout: {none_of(layout, LAYOUTS)}")
        self.model, self.units, self.head, self.example, self.layout = model, list(units), head, example, layout
        assert (shared is None) == (not shared_names), "a shared encoder, and the features it adds"
        self.shared, self.shared_names = shared, tuple(shared_names)
        self._shapes: list[Message] | None = None
        self._changed: list[frozenset[str]] = []
        self._prediction: Any = None

        self.check()

    def check(self) -> None:
        """Check that every parameter and buffer is in exactly one unit.

        Call this again after moving the model to another device, which replaces the buffers.

        Raises:
            ValueError: as the class.
        """
        _check_exact(self.model, [*([self.shared] if self.shared else []), *self.units, self.head])

    def __len__(self) -> int:
        return len(self.units)

    def names(self, *modules: nn.Module) -> list[str]:
        """The names in the model's ``state_dict`` of the parameters and persistent buffers in ``modules``."""
        # Compare by identity: a unit may wrap parts of the model in a new module, where names differ.
        wanted = {id(tensor) for module in modules for tensor in tensors_of(module).values()}
        return [name for name, tensor in tensors_of(self.model).items() if id(tensor) in wanted]

    def index(self, name: str) -> int:
        """The position of the unit with this name.

        Raises:
            ValueError: there is no such unit; the message lists the names of all units.
        """
        names = [unit.name for unit in self.units]
        if name not in names:
            raise ValueError(f"local.cut: {name!r} is not a unit of this network; its units are {', '.join(names)}")
        return names.index(name)

    def shapes(self) -> list[Message]:
        """The message after each unit, as meta tensors: shapes and types without the arithmetic.

        Raises:
            ValueError: a unit or the head fails on what the units before it make of ``example``, or returns something
                other than a message with a tensor ``x``. The message names it, and what it got.
        """
        if self._shapes is None:
            message, shapes, changed = self.example, list[Message](), list[frozenset[str]]()
            if self.shared is not None:
                message, _ = _run(self.shared, message)
            for unit in self.units:
                message, names = _run(unit, message)
                shapes.append(message)
                changed.append(names)
            self._prediction = _run(self.head, message, prediction=True)[0].features["x"]
            self._shapes, self._changed = shapes, changed
        return self._shapes

    def changed(self, index: int) -> frozenset[str]:
        """The names of the features that a unit changes in place, as far as evaluation mode shows.

        Raises:
            ValueError: as ``shapes``.
        """
        self.shapes()
        return self._changed[index]

    def prediction(self) -> Any:
        """The prediction for the example, as meta tensors.

        Raises:
            ValueError: as ``shapes``.
        """
        self.shapes()
        return self._prediction

    def __call__(self, message: Message) -> Tensor:
        """The plain forward pass of the whole network."""
        if self.shared is not None:
            message = self.shared(message)
        for unit in self.units:
            message = unit(message)
        return self.head(message).x


def _run(unit: Unit, message: Message, prediction: bool = False) -> tuple[Message, frozenset[str]]:
    """The message that ``unit`` makes of ``message``, as meta tensors, and the features that it changes in place.

    A ``prediction`` in ``x`` may be any nesting.
    """
    got = f"unit {unit.name!r}, given {_described(message)},"

    def forward(message: Message) -> Message:
        try:
            output = unit(message)
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(f"{got} fails: {described(error)}{place(error)}") from error
        if not isinstance(output, Message):
            kind = "a tensor" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{got} returns {kind}, not a Message; see docs/extend.md")
        if not prediction and not isinstance(output.features.get("x"), Tensor):
            kind = type(output.features["x"]).__name__ if "x" in output.features else "nothing"
            raise ValueError(
                f"{got} returns {kind} as x, not a tensor; give the unit a forward that puts the tensor into x and "
                "anything else into other features"
            )
        return output

    return changes(forward, message, [unit.module])


def _described(message: Message) -> str:
    def shape(value: object) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    return ", ".join(f"{name} {shape(value)}" for name, value in message.features.items())


def _check_types(model: object, units: object, head: object, example: object, shared: object) -> None:
    if not isinstance(units, list | tuple):
        raise ValueError(f"Chain: units must be a list of Unit, got {type(units).__name__}")
    members = {f"units[{number}]": unit for number, unit in enumerate(units)}
    wanted: dict[type, dict[str, object]] = {
        nn.Module: {"model": model},
        Unit: {**members, "head": head, **({} if shared is None else {"shared": shared})},
        Message: {"example": example},
    }
    for kind, arguments in wanted.items():
        for name, value in arguments.items():
            if not isinstance(value, kind):
                raise ValueError(f"Chain: {name} must be a {kind.__name__}, got {type(value).__name__}")


def _check_exact(model: nn.Module, units: Sequence[Unit]) -> None:
    for unit in units:
        for name, given in [*unit.module.named_parameters(), *unit.module.named_buffers()]:
            if is_lazy(given):
                raise ValueError(
                    f"{name!r} of unit {unit.name!r} has no shape yet, because it is in a lazy module; run the model "
                    "on an example before making the chain"
                )
    seen: set[str] = set()
    for unit in units:
        if unit.name in seen:
            raise ValueError(f"two units are called {unit.name!r}")
        seen.add(unit.name)
    # ``leave_out_frozen`` may have removed frozen parameters from the state, but a unit must hold them all the same.
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    names |= {id(tensor): name for name, tensor in tensors_of(model).items()}
    holders: dict[int, str] = {}
    for unit in units:
        held = {id(tensor) for tensor in tensors_of(unit.module).values()}  # a set: a unit may use a tensor twice
        for tensor in held:
            if tensor in holders:
                name = names.get(tensor, "a tensor")
                raise ValueError(f"{name!r} is in two units, {holders[tensor]!r} and {unit.name!r}")
            holders[tensor] = unit.name
    for tensor, name in names.items():
        if tensor not in holders:
            raise ValueError(f"{name!r} of the model is in no unit")
