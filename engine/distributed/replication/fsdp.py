"""Replicas that shard parameters, gradients and optimizer state: torch's FSDP2 around one block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from engine.distributed.replication.base import Replication
from engine.learning.block import Block
from engine.learning.optimizer import MakeOptimizer, load_state_by_name
from engine.learning.replica import fill_unused
from engine.network.message import Message


class FSDP(Replication):
    """A block's parameters are whole only during its local step; in between, each of R replicas holds 1/R of them."""

    def __init__(self, block: Block, group: dist.ProcessGroup, make_optimizer: MakeOptimizer) -> None:
        super().__init__(block, group)
        inside = set(self.whole.modules())
        places = {id(p): (module, key) for module in inside for key, p in module._parameters.items()}
        # FSDP replaces parameters only in the modules that it wraps. If a unit's module was made around a parameter of
        # some other module (a class token, for example), that other module must be given the new parameter as well.
        self._followers = [
            (module, key, *places[id(p)])
            for module in block.chain.model.modules()
            for key, p in module._parameters.items()
            if module not in inside and p is not None and id(p) in places
        ]
        mesh = DeviceMesh.from_group(group, block.device.type)
        # Backward follows forward at once, so sharding in between would only cost a second gather.
        self.wrapped = fully_shard(self.whole, mesh=mesh, reshard_after_forward=False)
        self._follow()
        self._averages = True
        block.attach(make_optimizer)

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self._averages = update
        self.wrapped.set_requires_gradient_sync(update)
        result: tuple[Message, Tensor] = self.whole(message)
        return result

    def train_backward(self, loss: Tensor) -> None:
        if self._averages:
            # FSDP reduces the gradients in a callback at the end of backward, and queues it when backward reaches the
            # loss. A view of the loss comes before that, so the callback queued here runs before FSDP's.
            loss = loss.view_as(loss)
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda _: Variable._execution_engine.queue_callback(self._fill_unused)
            )
        super().train_backward(loss)

    def _fill_unused(self) -> None:
        fill_unused([parameter for parameter in self.whole.parameters() if parameter.requires_grad], self.group)

    def train_update(self) -> Tensor:
        return _full(super().train_update())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self.wrapped.unshard()
        self._follow()
        # FSDP registers hooks that shard the block again when anyone calls state_dict on one of its modules. Take them
        # off while an evaluation reads the whole parameters.
        held = [(module, module._state_dict_pre_hooks) for module in self.whole.modules()]
        for module, hooks in held:
            module._state_dict_pre_hooks = OrderedDict(
                (key, hook) for key, hook in hooks.items() if not hook.__module__.startswith("torch.distributed.fsdp")
            )
        try:
            yield
        finally:
            for module, hooks in held:
                module._state_dict_pre_hooks = hooks
            self.wrapped.reshard()
            self._follow()

    def tensors(self) -> dict[str, Tensor]:
        return {name: _full(tensor) for name, tensor in super().tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.block.named_state()
        super().load_tensors({name: _like(tensors[name], own[name]) for name in own if name in tensors})

    def optimizer_state(self) -> dict[str, Tensor]:
        return {name: _full(tensor) for name, tensor in super().optimizer_state().items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        assert self.block.optimizer is not None
        named = self.block.parameters_by_name()
        load_state_by_name(self.block.optimizer, named, state)
        for _, parameter in named:
            own = self.block.optimizer.state.get(parameter, {})
            for key, value in own.items():
                if value.shape == parameter.shape:  # a step counter is a scalar, and stays whole
                    own[key] = _like(value, parameter)

    def _follow(self) -> None:
        """Give modules outside the wrapper the parameters that FSDP has put inside it."""
        for module, key, place, place_key in self._followers:
            module._parameters[key] = place._parameters[place_key]


def _full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = DTensor.full_tensor(tensor)  # a collective: all replicas get here with the same tensor
    return whole.detach()


def _like(tensor: Tensor, example: Tensor) -> Tensor:
    """Shard ``tensor``, which every replica has as a whole, like ``example``; nothing is sent."""
    if not isinstance(example, DTensor):
        return tensor
    mesh, rank = example.device_mesh, example.device_mesh.get_local_rank()
    rows = tensor.to(example.device).contiguous()
    chunks = rows.chunk(mesh.size())  # FSDP shards by rows too; with fewer rows than replicas, some shards are empty
    own = chunks[rank] if rank < len(chunks) else rows[:0]
    return DTensor.from_local(
        own.clone(), mesh, example.placements, run_check=False, shape=rows.shape, stride=rows.stride()
    )
