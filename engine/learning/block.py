"""A block: its units, their auxiliary network and optimizer, and the local step that trains them."""

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
from engine.learning.outcome import BlockError, Refusal, Report
from engine.learning.precision import autocast
from engine.learning.recompute import recomputing, run_recomputed
from engine.learning.replica import Replica
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.message import Message, unchanged
from engine.network.state import Unsaved, tensors_of
from engine.task import Task
from engine.utilities.seed import derive


class Conditioning(Protocol):
    """What a block needs to know of the encoder that makes the shared features."""

    def collect(self, leaves: Mapping[str, Tensor]) -> None:
        """Take the gradients that a block's backward left in its own leaves of the shared features."""
        ...


class Block(nn.Module):
    """Consecutive units trained by one local loss.

    A local step consists of forward, local loss, backward, clipping and optimizer step. It frees everything it
    allocated *before* the message goes on::

        message ----> units ----> auxiliary network ----> loss
                        |  (detach)                         |
                        v                                   v
        message' <------+        backward stops at the block's input

    The message arrives detached, so no gradient of the input is computed. The exception is shared conditioning, whose
    gradients go to its encoder (see ``engine.learning.shared``). In the last block, the task's own head takes the place
    of the auxiliary network.

    Args:
        chain: the network that the units belong to.
        span: which units of the chain the block has.
        auxiliary: maps (message, bank) to a prediction; None in the last block.
        task: provides the loss and the key features for the bank.
        seed: fixes, together with the block's index and the micro-batch, all random state (dropout), so that results do
            not depend on where the block runs or on what ran before.
        precision: ``fp32``, or ``bf16``/``fp16`` by autocast. With fp16, each block scales its own loss, so an overflow
            in one block skips the update of that block only.
        recompute: with ``units``, backward recomputes the activations of every unit except the last, whose activations
            it needs at once. ``none`` keeps all of them.
        offload: whether to keep the tensors that backward needs in main memory (see ``engine.learning.offload``).
        clip_norm: the largest gradient norm of *this block*, units and auxiliary network together, not of the whole
            network; 0 turns clipping off.
        keeps_key_features: whether to add key features to the message's bank, because a later block reads them.
        criterion: the block's loss (see ``Task.criteria``); None takes the task's loss.
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
        # A Unit is not a module. Only because the modules of the units are registered here does ``parameters()`` return
        # everything that the block trains.
        self.unit_modules = nn.ModuleList([unit.module for unit in self.units])
        self.auxiliary = auxiliary
        self.head_module = chain.head.module if span.last else None
        self.criterion = criterion or task.loss
        self.conditioning: tuple[Conditioning, ...] = ()
        """The encoder that takes the gradients of shared features; needed if the chain has any. It is in a tuple, since
        a module that is a plain attribute becomes a submodule, and its parameters would count as this block's."""
        self.precision, self.recompute, self.clip_norm = precision, recompute, clip_norm
        self.offload, self.keeps_key_features = offload, keeps_key_features
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_name = ""
        self.scaler: torch.amp.GradScaler | None = None
        self.replication: Replica | None = None
        self.unsaved = Unsaved({})
        self.infinite: frozenset[str] = frozenset()
        """Names of buffers that have infinite or undefined elements before training, such as a causal mask."""
        self.scaled, self.group_normed = precision == "fp16", False
        self.skipped = 0
        self.next_sequence = 0
        self.observers: list[Observer] = []
        self._predict: Callable[[Message], tuple[Message, Any]] = self._forward

    def attach(self, make_optimizer: MakeOptimizer) -> None:
        """Create the optimizer, over all parameters that the block trains (see ``named_state``)."""
        self.optimizer = make_optimizer(self.parameters_by_name())
        self.optimizer_name = type(self.optimizer).__name__
        self.unsaved = Unsaved(self.modules_by_name())
        self.group_normed = any(isinstance(module, nn.GroupNorm) for module in self.modules())
        # A disabled scaler passes losses through, so ``train_backward`` needs no case of its own.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)

    def compile_forward(self) -> None:
        """Compile the block's forward pass, including its auxiliary network, as one graph."""
        # Compile this method, not the module: the module's own forward is the units alone.
        self._predict = torch.compile(self._forward)

    @property
    def index(self) -> int:
        return self.span.index

    @property
    def title(self) -> str:
        """The block's first and last unit, such as ``stem ... layer1.2``, for tables."""
        first, last = self.units[0].name, self.units[-1].name
        return first if first == last else f"{first} ... {last}"

    @property
    def unit_names(self) -> list[str]:
        return [unit.name for unit in self.units]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def model_names(self) -> list[str]:
        """The framework's own names of the parameters and buffers of the model that this block holds."""
        head = [self.head_module] if self.head_module is not None else []
        return self.chain.names(*self.unit_modules, *head)

    def named_state(self) -> dict[str, Tensor]:
        """The block's parameters and buffers, by name.

        Tensors of the model have the model's own names. Those of the auxiliary network are called ``auxiliary.K.NAME``,
        and those of a loss with networks ``auxiliary.K.criterion.NAME``; K is the block's index.
        """
        model = tensors_of(self.chain.model)
        state = {name: model[name] for name in self.model_names()}
        if self.auxiliary is not None:
            own = tensors_of(self.auxiliary)
            state.update({f"auxiliary.{self.index}.{name}": tensor for name, tensor in own.items()})
        if isinstance(self.criterion, nn.Module):
            own = tensors_of(self.criterion)
            state.update({f"auxiliary.{self.index}.criterion.{name}": tensor for name, tensor in own.items()})
        return state

    def modules_by_name(self) -> dict[str, nn.Module]:
        """The block's modules, by the names that ``named_state`` uses."""
        heads = [self.head_module] if self.head_module is not None else []
        own = {id(module) for root in [*self.unit_modules, *heads] for module in root.modules()}
        found = {name: module for name, module in self.chain.model.named_modules() if id(module) in own}
        prefix = f"auxiliary.{self.index}"
        for name, root in ((prefix, self.auxiliary), (f"{prefix}.criterion", self.criterion)):
            if isinstance(root, nn.Module):
                found.update({f"{name}.{inner}".rstrip("."): module for inner, module in root.named_modules()})
        return found

    def parameters_by_name(self) -> Named:
        """The parameters in ``named_state``, without its buffers; a parameter with several names under its first."""
        # An optimizer that got a tied parameter twice would update it twice a step.
        once: dict[int, tuple[str, nn.Parameter]] = {}
        for name, tensor in self.named_state().items():
            if isinstance(tensor, nn.Parameter):
                once.setdefault(id(tensor), (name, tensor))
        return list(once.values())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint saves: for ``model``, ``auxiliary`` and ``optimizer``, whole tensors by name.

        The names are those of ``named_state``, and ``PARAMETER:STATE`` for optimizer state. The tensors may be the live
        ones, so copy them before training goes on. This is a collective call: all replicas make it together.
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
        """The inverse of ``state``. All replicas call this together, with the same tensors.

        Args:
            model: tensors of the model by name. Tensors of other blocks are ignored; tensors that are missing here keep
                their values.
            auxiliary: tensors of auxiliary networks and losses, likewise.
            optimizer: optimizer state; parameters without saved state start fresh.
        """
        tensors = {**model, **auxiliary}
        if self.replication is not None:
            self.replication.load_tensors(tensors)
            self.replication.load_optimizer_state(optimizer)
            return
        for name, tensor in self.named_state().items():
            if name in tensors:
                tensor.copy_(tensors[name])  # in place, because the optimizer holds this very tensor
        if self.optimizer is not None:
            load_state_by_name(self.optimizer, self.parameters_by_name(), optimizer)

    def gathered(self) -> AbstractContextManager[None]:
        """A context for evaluation and export, in which every replica has the whole parameters and may read them.

        Replicas that shard parameters (fsdp, zero3) enter and leave it together; inside, each of them may compute on
        its own. Outside, their ``forward`` and ``predict`` fail or wait for the other replicas. Do not call ``state``
        inside.
        """
        return nullcontext() if self.replication is None else self.replication.gathered()

    def forward(self, message: Message) -> Message:
        """Run the units alone, as evaluation does; return the message that the next block would get."""
        with self.autocast():
            for unit in self.units:
                message = self._run(unit, message)
        return message

    def predict(self, message: Message) -> Any:
        """The block's prediction: from the task's head in the last block, otherwise from its auxiliary network."""
        with self.autocast():
            return self._forward(message)[1]

    def _forward(self, message: Message) -> tuple[Message, Any]:
        output = self.forward(message)
        if self.auxiliary is None:
            return output, self.chain.head(output).x
        if torch.compiler.is_compiling():  # while it traces, tensors have no version counters
            return output, self.auxiliary(output, message.bank)
        sent = {
            **{f"feature {name!r}": value for name, value in output.features.items()},
            "the bank": dict(message.bank),
        }
        with unchanged(sent, f"the auxiliary network {type(self.auxiliary).__name__}"):
            return output, self.auxiliary(output, message.bank)

    def _run(self, unit: Unit, message: Message) -> Message:
        for observer in self.observers:
            observer.unit_started(unit)
        # Backward starts with the last unit. Recomputing it right after its forward pass would cost time and save no
        # memory.
        recomputed = self.recompute == "units" and torch.is_grad_enabled() and unit is not self.units[-1]
        output = run_recomputed(unit, message) if recomputed else unit(message)
        for observer in self.observers:
            observer.unit_ended(unit, output)
        return output

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context in which the block's forward and loss run."""
        return autocast(self.device, self.precision)

    def local_step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, Report]:
        """Train on one message.

        Args:
            message: the micro-batch; it is detached here, wherever it comes from.
            update: whether the optimizer steps after this micro-batch.
            weight: this micro-batch's share of the batch; the loss is multiplied by it before backward.

        Returns:
            The message for the next block (detached, with this block's key features in its bank if a later block reads
            them), and a report.

        Raises:
            Refusal: the block does something that this config cannot train.
            BlockError: anything else failed inside. It names the block and the micro-batch, and holds the cause.
        """
        for observer in self.observers:
            observer.started()
        try:
            output, report = self._local_step(self._arrived(message), update, weight)
        except Refusal as refusal:
            raise Refusal(f"block {self.index}: {refusal}") from None
        except Exception as cause:
            raise BlockError(self.index, message.sequence, cause) from cause
        for observer in self.observers:
            observer.ended(output)
        return output, report

    def _arrived(self, message: Message) -> Message:
        """The message as the local step takes it: detached, so that no gradient goes back."""
        message = message.detach()
        # On a CPU, PyTorch (up to 2.13 at least) crashes in the backward pass of a GroupNorm whose input is
        # channels-last and needs no gradient. What a frozen layer in front of it returns is not looked at.
        if self.group_normed and message.x.device.type == "cpu":
            return message.map(lambda tensor: tensor.contiguous() if tensor.dim() >= 4 else tensor)
        return message

    def _local_step(self, message: Message, update: bool, weight: float) -> tuple[Message, Report]:
        assert self.optimizer is not None, "attach an optimizer first"
        if message.sequence != self.next_sequence:
            raise ValueError(f"message {message.sequence} arrived, {self.next_sequence} expected")
        # Seed per block and micro-batch, so that dropout does not depend on which blocks this process runs.
        replica = () if self.replication is None else self.replication.seed
        torch.manual_seed(derive(self.seed, "step", self.index, message.sequence, *replica))
        way = self.replication or self
        # The message is detached, so these become leaves of this block alone; backward leaves their gradients in them.
        for name in self.chain.shared_names:
            message.features[name].requires_grad_()
        with self.autocast(), offloading(self.device) if self.offload else nullcontext():
            output, loss = way.train_forward(message, update)
        # Ready before backward begins: on streams, the next block starts from here while this one runs backward.
        output = self._outgoing(output, message)
        leaves = {name: message.features[name] for name in self.chain.shared_names}
        for observer in self.observers:
            observer.output_ready()
        share = loss if weight == 1 else loss * weight
        for observer in self.observers:
            observer.backward_started()
        way.train_backward(share)
        assert self.conditioning or not leaves, "a chain with shared features needs an encoder for their gradients"
        for conditioning in self.conditioning:
            conditioning.collect(leaves)
        norm = way.train_update() if update else loss.new_full((), float("nan"))
        self.next_sequence += 1
        return output, Report(self.index, loss.detach(), norm, self.skipped)

    def _outgoing(self, output: Message, message: Message) -> Message:
        """The message to send: the block's output, with its key features in the bank if a later block reads them."""
        if not self.keeps_key_features:
            return output
        with torch.no_grad():
            key = self.task.key_features(self.chain, output)
        return replace(output, bank=message.bank.add(self.index, key))

    def train_forward(self, message: Message, update: bool = True) -> tuple[Message, Tensor]:
        """The detached output and the loss. Only replication uses ``update``: it tells when to average gradients."""
        output, prediction = self._predict(message)
        with recomputing(self.recompute != "none"), unchanged({"its targets": message.targets}, "the loss"):
            return output.detach(), self.criterion(prediction, message.targets)

    def train_backward(self, loss: Tensor) -> None:
        """Run backward from the loss, which an fp16 scaler scales first."""
        assert self.scaler is not None
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def train_update(self) -> Tensor:
        """Unscale, clip, step and free the gradients.

        Returns:
            The block's gradient norm before clipping, as a scalar; nan if clipping is off.
        """
        assert self.optimizer is not None
        assert self.scaler is not None
        norm = torch.full((), float("nan"), device=self.device)
        if self.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)  # otherwise the limit would apply to scaled gradients
            norm = nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        if not self.scaled:
            self.optimizer.step()
        else:
            # GradScaler does not tell whether it skipped a step, but it lowers its scale only after skipping one.
            # Reading the scale makes the host wait for the device, so only fp16 pays for it.
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += int(self.scaler.get_scale() < before)
        self.optimizer.zero_grad(set_to_none=True)  # freed, so that the next block's gradients can take their place
        return norm
