"""Peak bytes and time of a training step, predicted on fake tensors: without a GPU, arithmetic or memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from engine.config import Config
from engine.learning.blocks import Blocks
from engine.learning.build import prepare
from engine.learning.outcome import BlockError
from engine.memory.footprint import Footprint, count_bytes
from engine.memory.work import Speed, WorkCounter
from engine.network.message import Message
from engine.network.shapes import needs_values, trial
from engine.utilities.text import described, one_line

UNSEEN = (
    "not seen: a GPU's context, workspaces of convolutions and matrix products, fragmentation, what torch.compile "
    "fuses away, and operators whose CUDA form keeps other tensors (dropout's mask, normalisation under autocast)"
)


@dataclass(frozen=True)
class Estimate:
    """The predicted bytes of a step, and its time on a device of the given speed (see ``engine.memory.work``)."""

    footprint: Footprint
    step_seconds: float
    units: list[str]
    """The units of each block, as in ``Block.title``."""


def estimate_step(blocks: Blocks, config: Config, message: Message, speed: Speed | None = None) -> Estimate:
    """Predict the bytes of all tensors alive at the peak of one optimizer step, and the time of the step.

    Args:
        blocks: as ``build_blocks`` returns them, on the CPU. Afterwards their tensors are fake, so the blocks cannot be
            used again. Only their parameters take real memory, and nothing is computed.
        config: provides schedule, optimizer, precision, recomputation, offload and accumulation.
        message: a micro-batch; only its shapes and types matter.
        speed: the speed of the device that will train; without it the time is 0.

    Known limitations: the estimate counts the tensors that PyTorch makes on the CPU, each rounded up to 512 bytes. It
    does not see workspaces (mostly those of convolutions), fragmentation, or the context of a GPU. Where the CUDA form
    of an operator keeps other tensors, the count is that of the CPU: dropout keeps a mask of the input's type (on CUDA,
    one byte per element), and under autocast, softmax and layer normalisation stay in bf16 (on CUDA, in fp32). The loss
    scaler of fp16 is left out. With ``local.compile``, the count is that of the uncompiled network.

    Raises:
        ValueError: as ``faking``, or the loss cannot be computed on fake tensors (a Refusal).
    """
    with faking():
        make_fake([blocks[0].chain.model, *blocks])
        for block in blocks:
            block.scaled = False  # a loss scaler reads values, and fake tensors have none
        config = replace(config, local=replace(config.local, compile=False))
        prepare(blocks, config, torch.device("cpu"))
        message = fake_message(message)
        work = WorkCounter(speed or Speed.infinite())
        footprint = count_bytes(blocks, config, message, beside=lambda: work)
    # ``count_bytes`` runs at most two micro-batches.
    repeats = config.train.accumulate / min(config.train.accumulate, 2)
    return Estimate(footprint, work.seconds * repeats, [block.title for block in blocks])


@contextmanager
def faking(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A context in which new tensors are fake, to run local steps without arithmetic; ``mode`` is by default new.

    Raises:
        ValueError: a block fails on the message of the task's ``example``, or something needs the values of tensors.
    """
    try:
        with trial([]), mode or FakeTensorMode():  # ``trial``: nothing is printed beside the error
            yield
    except Exception as error:
        cause = error.cause if isinstance(error, BlockError) else error
        if isinstance(cause, ValueError):
            raise cause from None
        if needs_values(cause):
            where = f"block {error.block}" if isinstance(error, BlockError) else "the network"
            raise ValueError(
                f"{where} needs the values of tensors, which a prediction of memory does not have "
                f"({described(cause)}); measure instead: tools/memory.py measure"
            ) from error
        if isinstance(error, BlockError):
            raise ValueError(f"on the message of example(): {one_line(error)}") from error
        raise


def fake_message(message: Message) -> Message:
    """A message of the same shapes and types, made of fake tensors; call it inside a ``FakeTensorMode``."""
    return message.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def make_fake(modules: Iterable[nn.Module]) -> None:
    """Replace every parameter and buffer by a fake tensor, under an active FakeTensorMode; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for root in modules:
        for module in root.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        wanted = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
                    held[name] = made[id(tensor)]  # type: ignore[assignment]
