"""Replicas whose parameters do not all take part in the loss: never, on some replicas, or in some steps only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.distributed.replication import prepare_replicas
from engine.learning.build import build_blocks, prepare
from engine.learning.optimizer import set_rate
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from tests.engine.distributed.test_replicas import (
    SIZES,
    UPDATES,
    ZERO,
    assert_close,
    batch,
    needs_deepspeed,
    on_replicas,
    part_of,
    states,
    train,
)
from tests.toy import Layer, Stack, Toy, config


class Trait(Layer):
    """A layer with an extra one that is left out: always, at random, or where the samples are of one sign."""

    def __init__(self, trait: str, norm: bool = False) -> None:
        super().__init__(6, 6, 0.0, norm)
        self.trait, self.extra, self.spare = trait, Layer(6, 6, 0.0, norm), nn.Linear(6, 6)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.trait == "reentrant":
            return x + checkpoint(self.extra, x, use_reentrant=True)
        dropped = {
            "unused": False,
            "random": self.training and bool(torch.rand(()) < 0.5),
            "by input": self.training and bool(x.detach().mean() > 0),
            "by input, later": self.training and self.passes > 1 and bool(x.detach().mean() > 0),
        }[self.trait]
        self.passes += 1
        self.used = not dropped
        return x if dropped else x + self.extra(x)


class TraitToy(Toy):
    """A stack whose layer number ``at`` has the trait."""

    def __init__(self, trait: str, norm: bool = False, at: int = 0) -> None:
        super().__init__(norm=norm)
        self.trait, self.at = trait, at

    def build_chain(self, initial: bool = True) -> Chain:
        torch.manual_seed(3)
        model = Stack(4, self.width, 0.0, self.norm)
        model.layers[self.at] = Trait(self.trait, self.norm)
        units = [Unit(f"layer{n}", layer) for n, layer in enumerate(model.layers)]
        example = Message({"x": torch.zeros(2, self.width)})
        return Chain(model, units, Unit("output", model.output), example, layout="NLC")


def made(trait: str, kind: str = "ddp", group: Any = None, norm: bool = False, at: int = 0) -> Any:
    settings = config(
        local__blocks=2,
        placement__replicas=2,
        placement__replication=kind,
        optimizer__name="adamw",
        optimizer__weight_decay=0.1 if kind in ("ddp", "fsdp") else 0.0,
    )
    task = TraitToy(trait, norm, at)
    blocks = build_blocks(task.build_chain(), settings, task)
    if group is None:
        prepare(blocks, settings, torch.device("cpu"))
    else:
        prepare_replicas(blocks, settings, torch.device("cpu"), group)
    return blocks


def _trained(group: Any, rank: int, kinds: list[str], trait: str, norm: bool) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in kinds:
        blocks = made(trait, kind, group, norm)
        train(blocks, rank)
        found[kind] = states(blocks)
    return found


KINDS = [
    ["ddp", "fsdp"],
    pytest.param([kind for kind in ZERO if " " not in kind], marks=[needs_deepspeed, pytest.mark.slow]),
]


@pytest.mark.parametrize("kinds", KINDS)
def test_a_parameter_that_no_replica_uses_stays_as_in_one_process(kinds: list[str]) -> None:
    blocks = made("unused", kinds[0])
    fresh = states(blocks)
    train(blocks)
    expected = states(blocks)
    assert torch.equal(fresh["model layers.0.spare.weight"], expected["model layers.0.spare.weight"])
    for found in on_replicas(_trained, kinds, "unused", False, seconds=400):
        for state in found.values():
            assert_close({name: state[name] for name in expected}, expected, "adamw")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_layers_dropped_at_random(kinds: list[str], norm: bool) -> None:
    """A dropped layer's gradient counts as 0; with BatchNorm, whose statistics cover all replicas, all drop alike."""
    first, second = on_replicas(_trained, kinds, "random", norm, seconds=400)
    for kind in kinds:
        assert first[kind].keys() == second[kind].keys()
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, second[kind][name]), f"{kind}: {name}"
            assert torch.isfinite(tensor).all()
        assert_close(first[kind], first[kinds[0]], "adamw")


def test_a_parameter_that_some_replicas_use_counts_as_0_on_the_others() -> None:
    """As in one process that runs the replicas' parts one after another."""
    blocks, first = made("by input"), 0
    layer = blocks[0].chain.model.layers[0]
    used: list[bool] = []
    for number, (size, update) in enumerate(zip(SIZES, UPDATES, strict=True)):
        last = next(n for n in range(number, len(SIZES)) if UPDATES[n])
        for rank in range(2):
            part = part_of(batch(number, size), rank)
            part = replace(part, sequence=2 * number + rank)
            for block in blocks:
                set_rate(block.optimizer, 0.05 / (1 + number))
                weight = part.batch / sum(SIZES[first : last + 1])
                part, _ = block.local_step(part, update=update and rank == 1, weight=weight)
            used.append(layer.used)
        first = number + 1 if update else first
    assert {used[n : n + 2] == [used[n]] * 2 for n in range(0, len(used), 2)} == {True, False}, "or nothing is tested"
    for found in on_replicas(_trained, ["ddp", "fsdp"], "by input", False):
        for state in found.values():
            assert_close(state, states(blocks), "adamw")


def _refused(group: Any, rank: int, kind: str, norm: bool, trait: str = "by input", at: int = 0) -> str:
    with pytest.raises(ValueError, match=f"^block {at // 2}: ") as refused:
        train(made(trait, kind, group, norm, at), rank)
    return str(refused.value)


def test_reentrant_recomputation_is_refused_with_ddp() -> None:
    for said in on_replicas(_refused, "ddp", False, "reentrant"):
        assert "a unit must not recompute in torch's reentrant form" in said
        assert "use local.recompute units" in said


def test_synchronised_statistics_need_replicas_that_run_the_same_layers() -> None:
    for said in on_replicas(_refused, "ddp", True):
        assert said.startswith(
            "block 0: with placement.sync_batch_norm true, all replicas must run the same layers, but"
        )
        assert "'layers.0.extra.norm' on replica " in said
        assert "'layers.1.norm' on replica " in said


def test_a_layer_at_the_end_that_only_one_replica_reaches_is_no_hang() -> None:
    for said in on_replicas(_refused, "ddp", True, "by input", 3):
        assert "'layers.3.extra.norm' on replica " in said
        assert "the end on replica " in said


def test_replicas_that_run_the_same_layers_at_first_only_mix_no_statistics() -> None:
    for said in on_replicas(_refused, "ddp", True, "by input, later"):
        assert said.startswith(
            "block 0: with placement.sync_batch_norm true, all replicas must run the same layers, but next come "
        )
        assert said.count("'layers.") == 1


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zero1", "takes part in the loss of 1 of 2 replicas; use ddp or fsdp"),
        ("zero2", "takes part in the loss of 1 of 2 replicas; use ddp or fsdp"),
        ("zero3", "with placement.replication zero3, all replicas must run the same layers, but next come"),
    ],
)
def test_zero_refuses_replicas_that_use_different_parameters(kind: str, words: str) -> None:
    for said in on_replicas(_refused, kind, False, seconds=400):
        assert words in said
        assert "'layers.0.extra." in said
