"""Any timm model as a chain, found by watching which module's output is the next module's input."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from engine.network.chain import Chain, Unit
from engine.network.message import Message
from engine.network.shapes import trial
from engine.utilities.text import described

# A tensor at one moment: its identity, and how often it had been changed in place.
_State = tuple[int, int]


@dataclass(frozen=True)
class _Call:
    """One call of a module during the forward pass."""

    name: str
    module: nn.Module
    inputs: tuple[_State, ...]
    output: _State


def _state(tensor: Tensor) -> _State:
    return id(tensor), tensor._version


class _NoChainError(ValueError):
    """A model is not a chain of modules."""


def _with(module: nn.Module, **attributes: Any) -> Any:
    """A shallow copy of ``module`` with other attributes."""
    shell = copy.copy(module)
    shell.__dict__ = {**module.__dict__, **attributes}
    return shell


class _PositionEmbedding(nn.Module):
    """A vision transformer's class token and position embedding, which belong to the model itself.

    ``_pos_embed`` runs on a stand-in for the model, which has this module's own parameters. So a copy of this module
    works on the parameters of the copy. Of children with parameters, the stand-in has shells without any, because
    ``_pos_embed`` may read their plain attributes (the grid of the patch embedding). A shell that is run is an error:
    one of an ``nn.Sequential``, for example, would do nothing.
    """

    def __init__(self, model: nn.Module, model_name: str) -> None:
        super().__init__()
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

        def shell(name: str, child: nn.Module) -> nn.Module:
            def forward(*_: Any, **__: Any) -> Any:
                raise _NoChainError(
                    f"model.name: {model_name} is not a chain of modules: it runs {name!r} where it adds positions; "
                    "write your own chain (docs/extend.md)"
                )

            made: nn.Module = _with(child, _parameters={}, _modules={}, forward=forward)
            return made

        children = {
            name: shell(name, child) if any(True for _ in child.parameters()) else child
            for name, child in model.named_children()
        }
        stand_in = _with(model, _parameters=self._parameters, _modules=children)
        self._stand_in = [stand_in]  # in a list, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        stand_in = self._stand_in[0]
        embedded: Tensor = type(stand_in)._pos_embed(stand_in, x)
        return embedded


def timm_chain(name: str, classes: int, size: int, pretrained: bool) -> Chain:
    """Build ``name`` with timm and split it into the finest units through which it is one chain.

    A module is divided into its children if each child's output is the next child's input. So a stage is divided into
    its residual blocks, while a residual block, whose shortcut bypasses its children, stays whole. The head is whatever
    ``forward_features`` does not use.

    Raises:
        ValueError: timm has no such model, or its features are not a chain of modules. The message names the place
            where the chain ends; in this case write a chain of your own, as ``docs/extend.md`` describes.
    """
    options: dict[str, Any] = {"num_classes": classes, "pretrained": pretrained}
    example = Message({"x": torch.zeros(2, 3, size, size)})
    try:
        model = timm.create_model(name, **options)
        # Networks with tokens or windows are built for one image size; others have no argument for it.
        if model.default_cfg.get("fixed_input_size") and model.default_cfg["input_size"][-1] != size:
            model = timm.create_model(name, img_size=size, **options)
    except Exception as error:  # a model's own code, or a download, may raise anything
        raise ValueError(f"model.name: timm cannot build {name!r} at {size} px: {described(error)}") from error
    parts = _divide(model, example.x, name)
    units = _units(parts)
    held = _held([unit.module for unit in units])
    head = nn.ModuleList(child for child in model.children() if not _held([child]) & held)

    def classify(_: nn.Module, message: Message) -> Message:
        return message.with_x(model.forward_head(message.x))

    layout = "NHWC" if getattr(model, "output_fmt", None) == Format.NHWC else "NCHW"
    chain = Chain(model, units, Unit("head", head, classify), example, layout)
    try:
        outputs = [message.x for message in chain.shapes()]
    except ValueError as error:
        raise ValueError(f"model.name: {name} at {size} px: {error}") from error
    # Units whose outputs have the same shape, that is the same resolution and width, form a stage.
    chain.units = [replace(unit, stage=str(tuple(x.shape[1:]))) for unit, x in zip(units, outputs, strict=True)]
    return chain


def _divide(model: nn.Module, x: Tensor, name: str) -> list[tuple[str, nn.Module]]:
    """The modules that ``model.forward_features`` runs one after another, divided as far as possible."""
    calls, result, start = _watch(model, x, name)
    done: list[tuple[str, nn.Module]] = []

    def descend(prefix: str, first: _State, last: _State, whole: nn.Module | None) -> bool:
        """Add the chain of calls directly below ``prefix`` from ``first`` to ``last``; return whether there is one."""
        below = [call for call in calls if call.name.startswith(prefix) and call.name != prefix.rstrip(".")]
        at, chosen = first, list[_Call]()
        while at != last or not chosen:
            step = next((c for c in below if c.inputs == (at,) and c not in chosen and _outermost(c, below, at)), None)
            if step is None:
                break
            chosen.append(step)
            at = step.output
        if at != last or not chosen or len({call.name for call in chosen}) < len(chosen):
            if whole is None:
                raise ValueError(
                    f"model.name: {name} is not a chain of modules: {_cause(below, chosen, at)}; write your own chain "
                    "(docs/extend.md)"
                )
            return False
        if whole is not None and not _held([whole]) <= _held([call.module for call in chosen]):
            return False
        for call in chosen:
            if not any(True for _ in call.module.children()) or not descend(
                call.name + ".", call.inputs[0], call.output, call.module
            ):
                done.append((call.name, call.module))
        return True

    descend("", start, result, None)
    return done


def _cause(calls: list[_Call], chain: list[_Call], end: _State) -> str:
    """Why a chain of calls does not go on from the tensor ``end``."""
    names = [call.name for call in chain]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"module {twice!r} runs twice"
    given = f"the output of module {names[-1]!r}" if names else "the image"
    taker = next((call for call in calls if end in call.inputs and len(call.inputs) > 1), None)
    if taker is not None:
        number = taker.inputs.index(end)
        return f"module {taker.name!r} takes {given} as argument {number} of {len(taker.inputs)} tensors"
    return f"no module takes {given} as its only tensor, so forward_features computes with it outside of modules"


def _outermost(call: _Call, calls: list[_Call], at: _State) -> bool:
    """Whether no other call with the same input contains this one."""
    return not any(call.name.startswith(other.name + ".") and other.inputs == (at,) for other in calls)


def _held(modules: list[nn.Module]) -> set[int]:
    """Identities of all parameters and persistent buffers in ``modules``."""
    return {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}


def _watch(model: nn.Module, x: Tensor, model_name: str) -> tuple[list[_Call], _State, _State]:
    """Run ``forward_features`` on fake tensors and record every call of a module.

    Raises:
        ValueError: the model fails on images of this size, or its features are no tensor. The message names the model.
    """
    calls: list[_Call] = []
    alive: list[Any] = []  # an identity is only unique while its tensor lives
    entered: list[tuple[_State, ...]] = []

    def enter(module: nn.Module, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]  # VoVNet has some in lists
        alive.extend(tensors)
        entered.append(tuple(_state(tensor) for tensor in tensors))

    def leave(name: str, module: nn.Module, output: Any) -> None:
        inputs = entered.pop()
        alive.append(output)
        if isinstance(output, Tensor):
            calls.append(_Call(name, module, inputs, _state(output)))

    def hooked(name: str, module: nn.Module) -> None:
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(lambda m, args, output: leave(name, m, output)).remove)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                hooked(name, module)
        if hasattr(model, "_pos_embed"):
            embedding = _PositionEmbedding(model, model_name)
            hooked("pos_embed", embedding)
            # Shadow the method during this forward pass, so that the embedding is recorded as the call of a module.
            model._pos_embed = embedding.__call__  # type: ignore[assignment]
            stack.callback(lambda: delattr(model, "_pos_embed"))
        # The model stays in training mode, so that functional dropout is not overlooked, but running statistics must
        # not change.
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training:
                module.eval()
                stack.callback(module.train)
        with trial([model]), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = torch.empty(x.shape)
            start = _state(inputs)
            try:
                result = model.forward_features(inputs)  # type: ignore[operator]
            except _NoChainError:
                raise
            except Exception as error:  # the model's own code may raise anything
                reached = f" after {calls[-1].name!r}" if calls else ""
                raise ValueError(
                    f"model.name: {model_name} cannot take images of {x.shape[-1]} px (data.size): it fails{reached} "
                    f"with {described(error)}"
                ) from error
            if not isinstance(result, Tensor):
                raise ValueError(
                    f"model.name: the features of {model_name} are a {type(result).__name__}, not one tensor; write "
                    "your own chain (docs/extend.md)"
                )
            alive.extend([inputs, result])
            return calls, _state(result), start


def _units(parts: list[tuple[str, nn.Module]]) -> list[Unit]:
    """Join modules that are too small for a unit: a module with weights takes those without that follow it."""
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, module in parts:
        weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
        if weights or not groups:
            groups.append([(name, module)])
        else:
            groups[-1].append((name, module))
    units = []
    for group in groups:
        name = group[0][0]
        module = group[0][1] if len(group) == 1 else nn.Sequential(*[module for _, module in group])
        units.append(Unit(name, module))
    return units
