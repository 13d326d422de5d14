"""From a chain and a config to blocks ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine.config import Config, LocalConfig
from engine.learning.auxiliary import AuxiliaryNetwork, build_auxiliary
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.optimizer import MakeOptimizer, build_optimizer
from engine.learning.recompute import changes_input
from engine.learning.schedules import find_schedule
from engine.learning.shared import SharedEncoder
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span, cut_by_count, cut_by_names
from engine.network.message import Message
from engine.network.shapes import infer_shapes, shapes_of
from engine.network.state import tensors_of
from engine.task import Task


def cut(chain: Chain, config: LocalConfig) -> list[Span]:
    """Where the config's blocks lie: one block for end-to-end training, otherwise cut by names or by count.

    Raises:
        ValueError: the cut does not fit the chain (see ``engine.network.cut``).
    """
    if config.end_to_end:
        return cut_by_count(chain, 1)
    if config.cut:
        return cut_by_names(chain, config.cut)
    return cut_by_count(chain, config.blocks, config.balance)


def build_blocks(chain: Chain, config: Config, task: Task, make: type[Block] = Block) -> Blocks:
    """Cut the chain and build a block with an auxiliary network for each part. ``prepare`` adds the optimizers.

    Args:
        make: the class of the blocks.

    Raises:
        ValueError: a schedule, cut, auxiliary network or option is unknown or does not fit, or a unit fails on the
            chain's example. The message names it.
    """
    find_schedule(config.local.schedule)
    local, spans = config.local, cut(chain, config.local)
    if local.recompute == "units":
        _check_recomputable(chain, spans)
    auxiliaries: list[AuxiliaryNetwork | None] = []
    bank = FeatureBank()
    for span in spans:
        last = span.last
        auxiliaries.append(
            None if last else build_auxiliary(local.auxiliary, chain, span, bank, task, config.train.seed)
        )
        # Meta tensors: the next auxiliary networks only need the shapes that the bank will have.
        bank = bank.add(span.index, task.key_features(chain, chain.shapes()[span.stop - 1]))
    options: dict[str, Any] = {
        "seed": config.train.seed,
        "precision": local.precision,
        "recompute": local.recompute,
        "offload": local.offload,
        "clip_norm": config.optimizer.clip_norm,
    }
    blocks = []
    for span, auxiliary, criterion in zip(spans, auxiliaries, task.criteria(chain, spans), strict=True):
        # A bank that no later block reads would only make messages larger.
        later = auxiliaries[span.index + 1 :]
        block = make(
            chain,
            span,
            auxiliary,
            task,
            keeps_key_features=any(other is not None and other.uses_bank for other in later),
            criterion=criterion,
            **options,
        )
        blocks.append(block)
    if chain.shared is not None:
        _check_shared(chain.shared.name, local)
        # It counts as one more block, so its files in a checkpoint and its random state have an index of their own.
        return Blocks(blocks, SharedEncoder(chain, task, index=len(blocks), **options))
    return Blocks(blocks)


def check_example(chain: Chain, task: Task) -> None:
    """Check that batches have every feature that the chain's units were tried on.

    Raises:
        ValueError: a feature is missing. The message names it.
    """
    has = shapes_of(task.example).features
    for name in chain.example.features:
        if name not in has:
            raise ValueError(
                f"the network's example has feature {name!r}, which no batch of {task.name} has (they have "
                f"{', '.join(has)}); let the units do without it, or let the task's message() and example() add it"
            )


def _check_recomputable(chain: Chain, spans: Sequence[Span]) -> None:
    """Refuse units that change their input in place; a block's last unit is not recomputed, so it may.

    Raises:
        ValueError: there is such a unit. The message names it.
    """
    for span in spans:
        for index in range(span.start, span.stop - 1):
            if chain.changed(index):
                raise ValueError(f"local.recompute: {changes_input(chain.units[index])}")


def fresh_blocks(config: Config, task: Task) -> Blocks:
    """The blocks of a new network without loaded weights, to be timed or measured and then dropped.

    Raises:
        ValueError: as ``check_example`` and ``build_blocks``.
    """
    chain = task.build_chain(initial=False)
    check_example(chain, task)
    return build_blocks(chain, config, task)


def _check_shared(name: str, local: LocalConfig) -> None:
    """Refuse options that a shared encoder does not support.

    Raises:
        ValueError: the schedule is ``streams``, or the precision is fp16.
    """
    if local.schedule == "streams":
        raise ValueError(
            f"local.schedule: {name!r} learns from every block, so no two blocks can overlap; use sequential"
        )
    if local.precision == "fp16":
        raise ValueError(
            f"local.precision: {name!r} sums the gradients of blocks, which fp16 would scale differently; use bf16"
        )


def batch_norm_name(blocks: Sequence[Block]) -> str | None:
    """The name of some BatchNorm in the model or in an auxiliary network; None if there is none.

    BatchNorm cannot train on a batch of one sample, so the caller refuses such a batch.
    """
    model = blocks[0].chain.model
    name: str
    for name, module in [*model.named_modules(), *(item for block in blocks for item in block.named_modules())]:
        if isinstance(module, _BatchNorm):
            return name
    return None


def remarks(blocks: Sequence[Block]) -> list[str]:
    """What a log should say about the blocks' auxiliary networks; what several of them say only once."""
    return list(dict.fromkeys(line for block in blocks if block.auxiliary for line in block.auxiliary.remarks))


Attach = Callable[[Block, MakeOptimizer], None]
"""A function that gives a block its optimizer, such as ``Block.attach``."""


def prepare(blocks: Blocks, config: Config, device: torch.device, attach: Attach = Block.attach) -> None:
    """Move the model and its blocks to ``device``, compile the blocks if the config says so, and add the optimizers.

    Args:
        attach: gives a block its optimizer. Where several ranks own the same blocks, it wraps the blocks as well (see
            ``engine.distributed.replication.prepare_replicas``).
    """
    # Networks are built on the CPU, so there is nothing to move; under fake tensors even a move to the same device
    # fails.
    if device.type != "cpu":
        model = blocks[0].chain.model
        # Blocks of other ranks are meta tensors (see ``keep_only``), which cannot be moved; then this rank's blocks
        # move one by one. Otherwise move the whole model, including modules that are part of no unit.
        if not any(tensor.is_meta for tensor in tensors_of(model).values()):
            model.to(device)
        for block in blocks:
            block.to(device)
        blocks[0].chain.check()  # a move replaces buffers: the units must still hold those of the model
    if config.local.compile:
        _compile(blocks)
    for block in blocks.learners:
        attach(block, lambda named: build_optimizer(config.optimizer, named))


def _compile(blocks: Blocks) -> None:
    from torch._dynamo import config  # here, because the import takes a second that other runs need not wait for

    # All blocks share one code object, and dynamo keeps a graph per block for it. Beyond its limit (8 by default) it
    # would run further blocks uncompiled. Older versions of torch call the limit cache_size_limit.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 4 * len(blocks.learners)))
    for block in blocks:
        block.compile_forward()


def arriving_messages(blocks: Sequence[Block], task: Task) -> list[Message]:
    """The message that reaches each block when the task's example passes through, as meta tensors.

    The blocks must still be on the CPU.
    """
    message, arriving = shapes_of(task.example), []
    for block in blocks:
        arriving.append(message)

        # As ``Block.local_step`` sends it, but without training: the units, then the key features for the bank.
        def forward(message: Message, block: Block = block) -> Message:
            output: Message = block(message)
            if block.keeps_key_features:
                key = task.key_features(block.chain, output)
                output = replace(output, bank=message.bank.add(block.index, key))
            return output

        message = infer_shapes(forward, message, [block])
    return arriving


def keep_only(own: Sequence[Block], blocks: Sequence[Block]) -> None:
    """Free the parameters and buffers of all ``blocks`` that are not this rank's ``own``.

    They become meta tensors, so that names and shapes stay known.
    """
    kept = {id(module) for block in own for module in block.modules()}  # losses of several blocks may share a network
    for block in blocks:
        if block not in own:
            for module in block.modules():
                if id(module) not in kept:
                    module._apply(lambda tensor: tensor.to("meta"), recurse=False)  # type: ignore[no-untyped-call]
