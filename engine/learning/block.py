"""A block: units, their auxiliary network, their optimizer, and the local step that trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.learning.auxiliary import AuxiliaryNetwork
from engine.learning.observer import Observer
from engine.learning.offload import offloading
from engine.learning.optimizer import MakeOptimizer, Named, load_state_by_name, state_by_name
from engine.learning.outcome import BlockError, Report
from engine.learning.precision import autocast
from engine.learning.recompute import recomputing, run_recomputed
from engine.learning.replica import Replica
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from engine.utilities.seed import derive


class Conditioning(Protocol):
    """Whatever makes the shared features that blocks read, as a block sees it."""

    def collect(self, leaves: Mapping[str, Tensor]) -> None:
        """Take the gradients that a block's backward has left in its own leaves of the shared features."""
        ...


class Block(nn.Module):
    """Consecutive units trained by one local loss.

    A local step is forward, local loss, backward, clip, optimizer step, and everything freed, *before*
    the message goes on::

        message ----> units ----> auxiliary network ----> loss
                        |  (detach)                         |
                        v                                   v
        message' <------+        backward stops at the block's input

    No gradient of the input is computed: the message arrives detached. (Shared conditioning apart, whose
    gradient goes to its encoder: see ``engine.learning.shared``.) In the last block the task's own head stands in the
    auxiliary network's place.

    Args:
        chain: the network the units belong to.
        span: which units.
        auxiliary: maps (message, bank) to a prediction; None in the last block.
        task: gives the loss and the key features for the bank.
        seed: with the block's index and the step it fixes all random state (dropout), so that results
            do not depend on where or after what the block runs.
        precision: ``fp32``, or ``bf16``/``fp16`` by autocast. Each block scales its own loss in fp16,
            so that one block's overflow skips that block's update only.
        recompute: ``units`` recomputes each unit's activations in backward instead of keeping them; all but the
            last unit's, which backward needs first. ``none`` keeps them.
        offload: keep what backward needs in main memory (see ``engine.learning.offload``).
        clip_norm: clip the gradient norm of *this block* (units and auxiliary network together) to
            this value; 0 clips nothing. It is not the norm over the whole network.
        keeps_key_features: add key features to the message's bank, since a later block reads them.
        criterion: the block's loss (see ``Task.criteria``); else the task's.
    """

    def __init__(
        self,
        chain: Chain,
        span: Span,
        auxiliary: AuxiliaryNetwork | None,
        task: Task,
        *,
        seed: int = 0,
        precision: str = "fp32",
        recompute: str = "none",
        offload: bool = False,
        clip_norm: float = 0.0,
        keeps_key_features: bool = False,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        assert (auxiliary is None) == span.last, "the last block, and only it, has the task's own head"
        self.chain, self.span, self.task, self.seed = chain, span, task, seed
        self.units: list[Unit] = span.units(chain)
        self.unit_modules = nn.ModuleList([unit.module for unit in self.units])
        self.auxiliary = auxiliary
        self.head_module = chain.head.module if span.last else None
        self.criterion = criterion or task.loss
        self.conditioning: Conditioning | None = None
        """Gets the gradients of shared features; needed if the chain has any."""
        self.precision, self.recompute, self.clip_norm = precision, recompute, clip_norm
        self.offload, self.keeps_key_features = offload, keeps_key_features
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_name = ""
        self.scaler: torch.amp.GradScaler | None = None
        self.replication: Replica | None = None
        self.scaled = precision == "fp16"
        self.skipped = 0
        self.next_sequence = 0
        self.observers: list[Observer] = []
        self._predict: Callable[[Message], tuple[Message, Any]] = self._forward

    def attach(self, make_optimizer: MakeOptimizer) -> None:
        """Create the optimizer over the block's own parameters, units and auxiliary network."""
        self.optimizer = make_optimizer(self.parameters_by_name())
        self.optimizer_name = type(self.optimizer).__name__
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)

    def compile_forward(self) -> None:
        """Compile the block's forward pass, auxiliary network included, as one graph of its own."""
        self._predict = torch.compile(self._forward)

    @property
    def index(self) -> int:
        return self.span.index

    @property
    def title(self) -> str:
        """Its units in a few words, as ``stem ... layer1.2``."""
        first, last = self.units[0].name, self.units[-1].name
        return first if first == last else f"{first} ... {last}"

    @property
    def unit_names(self) -> list[str]:
        return [unit.name for unit in self.units]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def model_names(self) -> list[str]:
        """The framework's own names of all the state this block holds of the model."""
        head = [self.head_module] if self.head_module is not None else []
        return self.chain.names(*self.unit_modules, *head)

    def named_state(self) -> dict[str, Tensor]:
        """Parameters and buffers, those of the model by its own names, then ``auxiliary.K.name``, the loss's too."""
        model = self.chain.model.state_dict(keep_vars=True)
        state = {name: model[name] for name in self.model_names()}
        if self.auxiliary is not None:
            own = self.auxiliary.state_dict(keep_vars=True)
            state.update({f"auxiliary.{self.index}.{name}": tensor for name, tensor in own.items()})
        if isinstance(self.criterion, nn.Module):
            own = self.criterion.state_dict(keep_vars=True)
            state.update({f"auxiliary.{self.index}.criterion.{name}": tensor for name, tensor in own.items()})
        return state

    def parameters_by_name(self) -> Named:
        """The parameters of ``named_state``."""
        return [(name, tensor) for name, tensor in self.named_state().items() if isinstance(tensor, nn.Parameter)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint keeps, by kind: ``model``, ``auxiliary``, ``optimizer`` -> name -> whole tensor.

        Names are those of ``named_state``, and ``parameter name:state name``. The tensors may be live: copy them.
        Replicas call this together.
        """
        assert self.optimizer is not None
        if self.replication is None:
            tensors, optimizer = self.named_state(), state_by_name(self.optimizer, self.parameters_by_name())
        else:
            tensors, optimizer = self.replication.tensors(), self.replication.optimizer_state()
        prefix = f"auxiliary.{self.index}."
        return {
            "model": {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith(prefix)},
            "auxiliary": {name: tensor.detach() for name, tensor in tensors.items() if name.startswith(prefix)},
            "optimizer": optimizer,
        }

    @torch.no_grad()
    def load(
        self,
        model: Mapping[str, Tensor],
        auxiliary: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
    ) -> None:
        """Inverse of ``state``; replicas call this together, with the same tensors.

        Args:
            model: may hold other blocks' tensors too; what it has not stays as it is.
            auxiliary: likewise.
            optimizer: parameters without saved state start fresh.
        """
        tensors = {**model, **auxiliary}
        if self.replication is not None:
            self.replication.load_tensors(tensors)
            self.replication.load_optimizer_state(optimizer)
            return
        for name, tensor in self.named_state().items():
            if name in tensors:
                tensor.copy_(tensors[name])
        if self.optimizer is not None:
            load_state_by_name(self.optimizer, self.parameters_by_name(), optimizer)

    def gathered(self) -> AbstractContextManager[None]:
        """A context for evaluation and export, in which the parameters are whole and may be read.

        Replicas that share parameters (fsdp, zero3) enter and leave it together; in between each does as it likes.
        Outside of it their ``forward`` and ``predict`` fail, or wait for the other replicas. No ``state`` inside.
        """
        return nullcontext() if self.replication is None else self.replication.gathered()

    def forward(self, message: Message) -> Message:
        """Run the units alone, as in evaluation."""
        with self.autocast():
            for unit in self.units:
                message = self._run(unit, message)
        return message

    def predict(self, message: Message) -> Any:
        """The block's prediction: of the task's head in the last block, else of its auxiliary network."""
        with self.autocast():
            return self._forward(message)[1]

    def _forward(self, message: Message) -> tuple[Message, Any]:
        output = self.forward(message)
        if self.auxiliary is None:
            return output, self.chain.head(output).x
        return output, self.auxiliary(output, message.bank)

    def _run(self, unit: Unit, message: Message) -> Message:
        for observer in self.observers:
            observer.unit_started(unit)
        # The last unit would be recomputed right after it was computed: nothing saved.
        recomputed = self.recompute == "units" and torch.is_grad_enabled() and unit is not self.units[-1]
        output = run_recomputed(unit, message) if recomputed else unit(message)
        for observer in self.observers:
            observer.unit_ended(unit, output)
        return output

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the block's forward and loss run in."""
        return autocast(self.device, self.precision)

    def local_step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, Report]:
        """Train on one message and send it on.

        Args:
            message: the micro-batch; it is detached here, whoever sent it.
            update: whether the optimizer steps after this micro-batch.
            weight: this micro-batch's share of the batch; the loss is multiplied by it before backward.

        Returns:
            The message for the next block (detached, this block's key features in its bank), and a report.

        Raises:
            BlockError: anything that goes wrong inside, with the block and the micro-batch.
        """
        for observer in self.observers:
            observer.started()
        try:
            output, report = self._local_step(message.detach(), update, weight)
        except Exception as cause:
            raise BlockError(self.index, message.sequence, cause) from cause
        for observer in self.observers:
            observer.ended(output)
        return output, report

    def _local_step(self, message: Message, update: bool, weight: float) -> tuple[Message, Report]:
        assert self.optimizer is not None, "attach an optimizer first"
        if message.sequence != self.next_sequence:
            raise ValueError(f"message {message.sequence} arrived, {self.next_sequence} expected")
        # Replicas have different samples, so each draws its own dropout.
        replica = [] if self.replication is None else [self.replication.rank]
        torch.manual_seed(derive(self.seed, "step", self.index, message.sequence, *replica))
        way = self.replication or self
        for name in self.chain.shared_names:
            message.features[name].requires_grad_()
        with self.autocast(), offloading(self.device) if self.offload else nullcontext():
            output, loss = way.train_forward(message, update)
        output = self._outgoing(output.detach(), message)
        leaves = {name: message.features[name] for name in self.chain.shared_names}
        for observer in self.observers:
            observer.output_ready()
        share = loss if weight == 1 else loss * weight
        for observer in self.observers:
            observer.backward_started()
        way.train_backward(share)
        if leaves:
            assert self.conditioning is not None, "nobody would learn from the gradients of shared features"
            self.conditioning.collect(leaves)
        norm = way.train_update() if update else loss.new_full((), float("nan"))
        self.next_sequence += 1
        return output, Report(self.index, loss.detach(), norm, self.skipped)

    def _outgoing(self, output: Message, message: Message) -> Message:
        """What the block sends: its output, with its key features in the bank if a later block reads them."""
        if not self.keeps_key_features:
            return output
        with torch.no_grad():
            key = self.task.key_features(self.chain, output)
        return replace(output, bank=message.bank.add(self.index, key))

    def train_forward(self, message: Message, update: bool = True) -> tuple[Message, Tensor]:
        """Output and loss. (That the optimizer steps after this micro-batch matters to replicas alone.)"""
        output, prediction = self._predict(message)
        with recomputing(self.recompute != "none"):
            return output, self.criterion(prediction, message.targets)

    def train_backward(self, loss: Tensor) -> None:
        """Backward from the scaled loss."""
        assert self.scaler is not None
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def train_update(self) -> Tensor:
        """Unscale, clip, step, free the gradients; the norm before clipping (nan without)."""
        assert self.optimizer is not None
        assert self.scaler is not None
        norm = torch.full((), float("nan"), device=self.device)
        if self.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        if not self.scaled:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += int(self.scaler.get_scale() < before)
        self.optimizer.zero_grad(set_to_none=True)
        return norm
