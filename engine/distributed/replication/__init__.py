"""Replication: several ranks own the same block and train on different parts of each micro-batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from engine.config import Config
from engine.distributed.replication.base import Replication
from engine.distributed.replication.lockstep import compare_order
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.build import prepare
from engine.learning.optimizer import MakeOptimizer
from engine.learning.shared import SharedEncoder


def prepare_replicas(blocks: Blocks, config: Config, device: torch.device, group: dist.ProcessGroup) -> None:
    """The counterpart of ``engine.learning.build.prepare`` for blocks that all ranks of ``group`` own.

    Raises:
        ValueError: as ``replicate``.
    """
    for block in blocks.learners:
        block.task.group = group
    if blocks.encoder is not None:
        blocks.encoder.group = group

    def attach(block: Block, make_optimizer: MakeOptimizer) -> None:
        learns = any(parameter.requires_grad for parameter in block.parameters())
        # A shared encoder averages its gradients itself. A block without parameters to train stays the same on every
        # replica, and DDP would refuse it.
        if isinstance(block, SharedEncoder) or not learns:
            block.attach(make_optimizer)
        else:
            replicate(block, config, group, make_optimizer)

    prepare(blocks, config, device, attach)


def replicate(block: Block, config: Config, group: dist.ProcessGroup, make_optimizer: MakeOptimizer) -> None:
    """Turn ``block`` into one of its replicas on the ranks of ``group``, and give it its optimizer.

    Each block has a wrapper of its own, because one wrapper around several blocks with several backward passes would
    average some gradients twice and others never. Without ``placement.sync_batch_norm``, each replica has running
    statistics of its own, and checkpoints hold those of replica 0.

    Raises:
        ValueError: the config asks for something that this kind of replication cannot do (the message names both keys),
            or DeepSpeed is missing.
    """
    placement, local = config.placement, config.local
    kind = placement.replication
    if kind != "ddp" and local.precision == "fp16":
        raise ValueError(f"local.precision: fp16 cannot be combined with placement.replication {kind}; use bf16")
    if placement.offload_optimizer and not kind.startswith("zero"):
        raise ValueError(f"placement.offload_optimizer: needs placement.replication zero1, zero2 or zero3, not {kind}")
    # The imports below are inside the branches, so that a run only needs what its kind of replication uses.
    collective: dict[nn.Module, str] = {}  # modules whose forward pass is a collective call, and the key that says so
    if placement.sync_batch_norm:
        from engine.distributed.replication.batch_norm import SYNCHRONISED, synchronise

        collective |= dict.fromkeys(synchronise(block.modules_by_name(), group), SYNCHRONISED)
    if kind == "zero3":
        owners = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
        collective |= dict.fromkeys(owners, "placement.replication zero3")
    replication: Replication
    if kind == "ddp":
        from engine.distributed.replication.ddp import DDP

        replication = DDP(block, group, make_optimizer)
    elif kind == "fsdp":
        from engine.distributed.replication.fsdp import FSDP

        replication = FSDP(block, group, make_optimizer)
    else:
        from engine.distributed.replication.zero import Zero

        replication = Zero(block, group, make_optimizer, int(kind[-1]), placement.offload_optimizer)
    if collective and not local.compile:  # a hook would break the graph
        compare_order(replication.whole, block.modules_by_name(), collective, group)
    if collective or kind.startswith("zero"):
        # All replicas must run the same layers, also where a network drops layers at random: with ZeRO because it sends
        # gradients in the order in which backward makes them.
        replication.seed = ()
    block.replication = replication
