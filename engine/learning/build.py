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
from engine.learning.schedules import find_schedule
from engine.learning.shared import SharedEncoder
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span, cut_by_count, cut_by_names
from engine.network.message import Message
from engine.network.shapes import infer_shapes, shapes_of
from engine.task import Task


def cut(chain: Chain, config: LocalConfig) -> list[Span]:
    """The spans that a config asks for: one for end-to-end training, else by names or by count."""
    if config.end_to_end:
        return cut_by_count(chain, 1)
    if config.cut:
        return cut_by_names(chain, config.cut)
    return cut_by_count(chain, config.blocks, config.balance)


def build_blocks(chain: Chain, config: Config, task: Task, make: type[Block] = Block) -> Blocks:
    """Cut the chain and give each block its auxiliary network; ``prepare`` gives optimizers.

    Args:
        make: the kind of the blocks.

    Raises:
        ValueError: a schedule, cut, auxiliary network or option that is unknown or does not fit; names it.
    """
    find_schedule(config.local.schedule)
    local, spans = config.local, cut(chain, config.local)
    auxiliaries: list[AuxiliaryNetwork | None] = []
    bank = FeatureBank()
    for span in spans:
        last = span.last
        auxiliaries.append(
            None if last else build_auxiliary(local.auxiliary, chain, span, bank, task, config.train.seed)
        )
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
        return Blocks(blocks, SharedEncoder(chain, task, index=len(blocks), **options))
    return Blocks(blocks)


def fresh_blocks(config: Config, task: Task) -> Blocks:
    """The blocks of a network of its own that loads no weights: to be timed or measured, then dropped."""
    return build_blocks(task.build_chain(initial=False), config, task)


def _check_shared(name: str, local: LocalConfig) -> None:
    """Refuse what cannot be had with a shared encoder."""
    if local.schedule == "streams":
        raise ValueError(f"local.schedule: {name!r} learns from every block, so no two overlap; use sequential")
    if local.precision == "fp16":
        raise ValueError(
            f"local.precision: {name!r} sums the gradients of blocks, which fp16 would scale differently; use bf16"
        )


def batch_norm_name(blocks: Sequence[Block]) -> str | None:
    """The name of a BatchNorm in the model or in an auxiliary network: with one, a batch of 1 is refused."""
    model = blocks[0].chain.model
    name: str
    for name, module in [*model.named_modules(), *(item for block in blocks for item in block.named_modules())]:
        if isinstance(module, _BatchNorm):
            return name
    return None


Attach = Callable[[Block, MakeOptimizer], None]
"""Gives a block its optimizer; ``Block.attach`` is one."""


def prepare(blocks: Blocks, config: Config, device: torch.device, attach: Attach = Block.attach) -> None:
    """Move the model and its blocks to ``device``, give each block its optimizer, compile if asked to.

    Args:
        attach: what gives optimizers. Where several ranks hold the same blocks it wraps them too
            (``engine.distributed.replication.prepare_replicas``).
    """
    # Moving to where a tensor is already would still fail under fake tensors.
    if device.type != "cpu":
        model = blocks[0].chain.model
        if not any(tensor.is_meta for tensor in model.state_dict().values()):  # no block is on another rank
            model.to(device)
        for block in blocks:
            block.to(device)
        blocks[0].chain.check()
    if config.local.compile:
        _compile(blocks)
    for block in blocks.learners:
        attach(block, lambda named: build_optimizer(config.optimizer, named))


def _compile(blocks: Blocks) -> None:
    from torch._dynamo import config  # takes a second to import

    # Blocks share the code that is compiled, and a graph is kept for each: more than dynamo's limit of 8.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 4 * len(blocks.learners)))
    for block in blocks:
        block.compile_forward()


def arriving_messages(blocks: Sequence[Block], task: Task) -> list[Message]:
    """The message that reaches each block from the task's example, as meta tensors; blocks are on the CPU."""
    message, arriving = shapes_of(task.example), []
    for block in blocks:
        arriving.append(message)

        def forward(message: Message, block: Block = block) -> Message:
            output: Message = block(message)
            if block.keeps_key_features:
                key = task.key_features(block.chain, output)
                output = replace(output, bank=message.bank.add(block.index, key))
            return output

        message = infer_shapes(forward, message, [block])
    return arriving


def keep_only(own: Sequence[Block], blocks: Sequence[Block]) -> None:
    """Free the parameters and buffers of the blocks that other ranks have; their shapes stay known."""
    kept = {id(module) for block in own for module in block.modules()}  # losses may share frozen networks
    for block in blocks:
        if block not in own:
            for module in block.modules():
                if id(module) not in kept:
                    module._apply(lambda tensor: tensor.to("meta"), recurse=False)  # type: ignore[no-untyped-call]
