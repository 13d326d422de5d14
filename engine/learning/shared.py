"""Shared conditioning: an encoder whose features several blocks read; the sum of their gradients trains it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.learning.block import Block
from engine.learning.offload import offloading
from engine.learning.outcome import BlockError
from engine.learning.replica import fill_unused
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from engine.utilities.seed import derive


class SharedEncoder(Block):
    """The encoder of a chain's shared conditioning (``Chain.shared``), with an optimizer of its own.

    Blocks are isolated from each other, so no single block can train features that all of them read. Each block gets
    the features as a leaf of its own, and hands back the gradient of that leaf::

        message ---> encoder -----------------> block 0 ----> block 1 ----> ... last block
                        |    features f          leaf f_0      leaf f_1           |
                        |                           | g_0         | g_1           | g_K
                        +--- backward from g_0 + g_1 + ... + g_K, update <--------+

    With a single block, this is ordinary backpropagation. The encoder's activations stay alive throughout the step.

    Args:
        index: the number after the last block's; it names the encoder's files in a checkpoint and seeds its random
            state.

    Known limitations: the features of the next step depend on the gradients of all blocks in this step, so neither
    streams nor the stages of a pipeline can overlap. Replicas always average the encoder's gradients, whatever state of
    the blocks they shard. fp16 is refused, because each block would scale its gradient by a factor of its own.
    """

    def __init__(self, chain: Chain, task: Task, *, index: int, **options: Any) -> None:
        # A span without units that counts as the last block, so that ``Block`` expects no auxiliary network.
        super().__init__(chain, Span(index, index + 1, 0, 0), None, task, **options)
        assert chain.shared is not None
        self.units = [chain.shared]
        self.unit_modules.append(chain.shared.module)
        self.head_module = None  # the head belongs to the real last block
        self.group: dist.ProcessGroup | None = None
        self._made: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def encode(self, message: Message) -> Message:
        """Add the shared features to the message, detached. The graph that made them stays alive until ``learn``.

        Raises:
            BlockError: the encoder failed.
        """
        assert not self._made, "learn from this message first"
        for observer in self.observers:
            observer.started()
        replica = [] if self.group is None else [dist.get_rank(self.group)]
        torch.manual_seed(derive(self.seed, "step", self.index, message.sequence, *replica))
        try:
            with offloading(self.device) if self.offload else nullcontext():
                output: Message = self(message.detach())
        except Exception as cause:
            raise BlockError(self.index, message.sequence, cause) from cause
        self._made = {name: output.features[name] for name in self.chain.shared_names}
        output = replace(output.detach(), sequence=message.sequence)
        for observer in self.observers:
            observer.ended(output)
        return output

    def collect(self, leaves: Mapping[str, Tensor]) -> None:
        """Add a block's gradients to the sum."""
        # In fp32, because small gradients would vanish in a bf16 sum. Blocks call this in their order, so the sum is
        # bit-identical from run to run.
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                own = leaf.grad.float()
                self._gradients[name] = self._gradients[name] + own if name in self._gradients else own

    def learn(self, update: bool) -> None:
        """Run one backward pass from the summed gradients, and update the encoder if ``update`` says so.

        Raises:
            BlockError: backward or the update failed.
        """
        made, gradients, self._made, self._gradients = self._made, self._gradients, {}, {}
        for observer in self.observers:
            observer.started()
        pairs = [(made[name], gradient.to(made[name].dtype)) for name, gradient in gradients.items()]
        try:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
            if update:
                if self.group is not None:
                    self._average(self.group)
                self.train_update()
        except Exception as cause:
            raise BlockError(self.index, self.next_sequence, cause) from cause
        self.next_sequence += 1
        for observer in self.observers:
            observer.ended(None)

    def _average(self, group: dist.ProcessGroup) -> None:
        learning = [parameter for _, parameter in self.parameters_by_name() if parameter.requires_grad]
        fill_unused(learning, group)
        for parameter in learning:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= dist.get_world_size(group)
