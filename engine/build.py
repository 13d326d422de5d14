"""From a chain and a config to blocks ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from engine.auxiliary import AuxiliaryNetwork, build_auxiliary
from engine.bank import FeatureBank
from engine.block import Block
from engine.chain import Chain
from engine.config import Config, LocalConfig
from engine.cut import Span, cut_by_count, cut_by_names
from engine.optimizer import build_optimizer
from engine.replication import replicate
from engine.shared import SharedEncoder, with_encoder
from engine.task import Task


def cut(chain: Chain, config: LocalConfig) -> list[Span]:
    """The spans that a config asks for: one for end-to-end training, else by names or by count."""
    if config.schedule == "end_to_end":
        return cut_by_count(chain, 1)
    if config.cut:
        return cut_by_names(chain, config.cut)
    return cut_by_count(chain, config.blocks, config.balance)


def build_blocks(chain: Chain, config: Config, task: Task, make: type[Block] = Block) -> list[Block]:
    """Cut the chain and give each block its auxiliary network; ``prepare`` gives optimizers.

    ``make`` is the kind of the blocks.

    Raises:
        ValueError: a cut, auxiliary network or option that does not fit; names it.
    """
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
        "checkpointing": local.checkpoint,
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
        encoder = SharedEncoder(chain, task, index=len(blocks), **options)
        for block in blocks:
            block.encoders = (encoder,)
    return blocks


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


def prepare(
    blocks: list[Block], config: Config, device: torch.device, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Move the model and its blocks to ``device``, give each block its optimizer, compile if asked to.

    ``group`` is that of the ranks which hold the same blocks, if several do.
    """
    # Moving to where a tensor is already would still fail under fake tensors.
    if device.type != "cpu":
        model = blocks[0].chain.model
        if not any(tensor.is_meta for tensor in model.state_dict().values()):  # no block is on another rank
            model.to(device)
        for block in blocks:
            block.to(device)
        blocks[0].chain.check()
    blocks = with_encoder(blocks)
    if config.local.compile:
        # Blocks share the code that is compiled, and a graph is kept for each: more than dynamo's limit of 8.
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 4 * len(blocks)))
    for block in blocks:
        block.task.group = group
        shared = isinstance(block, SharedEncoder)
        if isinstance(block, SharedEncoder):
            block.group = group
        elif config.local.compile:
            block.compile_forward()
        learns = any(parameter.requires_grad for parameter in block.parameters())
        if group is None or shared or not learns:  # replicas of what never changes are alike
            block.attach(lambda named: build_optimizer(config.optimizer, named))
        else:
            replicate(block, config, group, lambda named: build_optimizer(config.optimizer, named))
