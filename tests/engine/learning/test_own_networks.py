"""Networks of users' own with traits that no framework's backbone has: what is trained, sent and saved stays right."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.learning.blocks import Blocks
from engine.learning.build import build_blocks, prepare
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from engine.run.checkpoint import Position
from engine.run.export import export_model
from engine.run.resume import load_model
from engine.run.save import save_checkpoint
from engine.run.trainer import Trainer
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification
from tests.toy import load_checkpoint


def pooled(module: nn.Module, message: Message) -> Message:
    return message.with_x(module(message.x.mean((2, 3))))


def chain_of(*layers: nn.Module, width: int = 8) -> Chain:
    """Layers of 3x8x8 images, then a linear head."""
    torch.manual_seed(0)
    model = nn.Sequential(*copy.deepcopy(layers), nn.Linear(width, 10))
    units = [Unit(f"layer{number}", model[number]) for number in range(len(layers))]
    return Chain(model, units, Unit("head", model[-1], pooled), Message({"x": torch.zeros(2, 3, 8, 8)}))


def blocks_of(chain: Chain, blocks: int, auxiliary: Any = "glcan", **local: Any) -> Blocks:
    config = ClassificationConfig(task="classification")
    config.local.blocks, config.local.auxiliary = blocks, auxiliary
    config.local.schedule = "end_to_end" if blocks == 1 else "sequential"
    config.optimizer.momentum, config.optimizer.nesterov, config.optimizer.weight_decay = 0.0, False, 0.0
    for name, value in local.items():
        setattr(config.optimizer if hasattr(config.optimizer, name) else config.local, name, value)
    made = build_blocks(chain, config, Classification(config))
    prepare(made, config, torch.device("cpu"))
    return made


def batch(sequence: int = 0) -> Message:
    generator = torch.Generator().manual_seed(sequence)
    targets = torch.randint(10, (4,), generator=generator)
    return Message({"x": torch.randn(4, 3, 8, 8, generator=generator)}, targets, sequence=sequence)


class InPlace(nn.Module):
    """Changes its input, as an in-place ReLU at a unit's start does."""

    def __init__(self, inputs: int, how: str) -> None:
        super().__init__()
        self.how, self.convolution = how, nn.Conv2d(inputs, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "part":
            x[:, :1].mul_(2)
        elif self.how == "dropout":
            nn.functional.dropout(x, 0.5, self.training, inplace=True)
        else:
            x.mul_(2)
        return self.convolution(x)


@pytest.mark.parametrize("how", ["whole", "part"])
@pytest.mark.parametrize(
    "auxiliary",
    ["glcan", {"type": "glcan", "reduce": 1}, {"type": "glcan", "reduce": 8}, {"type": "glcan", "width": 2.0}, "dgl"],
    ids=str,
)
def test_an_auxiliary_network_never_changes_what_its_block_sends(how: str, auxiliary: Any) -> None:
    """GLCAN's copy of a unit that works in place did: the next block trained on twice what evaluation sees."""
    layers = nn.Conv2d(3, 8, 3, padding=1), *(InPlace(8, how) for _ in range(2))
    first = blocks_of(chain_of(*layers), 3, auxiliary)[0]
    with torch.no_grad():
        wanted = first(batch()).x
    sent, _ = first.local_step(batch())
    assert torch.equal(sent.x, wanted)


def test_dropout_in_place_is_not_in_place_in_a_copy() -> None:
    dropping = nn.Sequential(nn.Dropout2d(0.5, inplace=True), nn.Conv2d(8, 8, 3, padding=1))
    first = blocks_of(chain_of(nn.Conv2d(3, 8, 3, padding=1), dropping), 2, {"type": "glcan", "reduce": 1})[0]
    with torch.no_grad():
        wanted = first(batch()).x
    assert torch.equal(first.local_step(batch())[0].x, wanted)
    assert first.chain.units[1].module[0].inplace, "the network's own stays as its author made it"


def test_what_cannot_be_foreseen_is_refused() -> None:
    """Only in training does this unit write into its input."""
    layers = nn.Conv2d(3, 8, 3, padding=1), InPlace(8, "dropout")
    first = blocks_of(chain_of(*layers), 2, {"type": "glcan", "reduce": 1})[0]
    with pytest.raises(RuntimeError, match="auxiliary network GLCAN changes feature 'x' in place, and the next block"):
        first.local_step(batch())


def test_a_loss_that_changes_its_targets_is_refused() -> None:
    first = blocks_of(chain_of(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)), 2)[0]
    first.criterion = lambda prediction, targets: nn.functional.cross_entropy(prediction, targets.clamp_(max=5))
    with pytest.raises(RuntimeError, match="the loss changes its targets in place, and the next block would get"):
        first.local_step(batch())


class Twice(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1, bias=False)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class TiedWeights(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [Twice, TiedWeights])
@pytest.mark.parametrize(("name", "make"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_a_tied_parameter_learns_at_its_own_speed(kind: type[nn.Module], name: str, make: Any) -> None:
    """It was in the optimizer once per name, and learned at double speed."""
    chain = chain_of(kind(), width=3)
    plain = copy.deepcopy(chain.model)
    (block,) = blocks_of(chain, 1, name=name)
    options = {"weight_decay": 0.0, "betas": (0.0, 0.999)} if name == "adamw" else {}
    optimizer = make(plain.parameters(), ClassificationConfig().optimizer.lr, **options)
    for step in range(3):
        block.local_step(batch(step))
        x = plain[0](batch(step).x).mean((2, 3))
        nn.functional.cross_entropy(plain[1](x), batch(step).targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (key, ours), theirs in zip(chain.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)
    assert len(block.parameters_by_name()) == len(list(plain.parameters()))


class Counting(nn.Module):
    """Its output depends on how often it ran: a buffer in place, a buffer anew, and a number."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, 8, 3, padding=1)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("fresh", torch.zeros(()), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.fresh = self.fresh + 1
            self.calls += 1
        return self.convolution(x) / (1 + self.seen) + self.fresh + self.calls


def spectral(inputs: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, 8, 3, padding=1))


def old_spectral(inputs: int) -> nn.Module:
    return nn.utils.spectral_norm(nn.Conv2d(inputs, 8, 3, padding=1))


def normed(inputs: int) -> nn.Module:
    norm = nn.BatchNorm2d(8, momentum=None)
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), norm)


@pytest.mark.parametrize("make", [Counting, spectral, old_spectral, normed])
def test_recomputation_moves_no_state_twice(make: Callable[[int], nn.Module]) -> None:
    results = []
    for recompute in ("none", "units"):
        chain = chain_of(make(3), make(8), make(8))
        (block,) = blocks_of(chain, 1, recompute=recompute)
        losses = [block.local_step(batch(step))[1].loss for step in range(3)]
        results.append((losses, dict(chain.model.named_buffers()), dict(chain.model.named_parameters())))
    (losses, buffers, parameters), again = results
    assert losses == again[0]
    for name, tensor in {**buffers, **parameters}.items():
        assert torch.equal(tensor, {**again[1], **again[2]}[name]), name


class Mask(nn.Module):
    """A causal mask, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class OwnState(nn.Module):
    """State that ``state_dict`` does not hold as a persistent buffer: it steers what the layer computes."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.convolution, self.count = kind, nn.Conv2d(3, 8, 3, padding=1), 0
        if kind == "buffer":
            self.register_buffer("strength", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            if self.kind == "buffer":
                self.strength *= 0.5
        if self.kind == "buffer":
            return self.convolution(x) * self.strength
        return self.convolution(x) / (1 + self.count)


class Extra(OwnState):
    def get_extra_state(self) -> Any:
        return {"tensor": torch.tensor(self.count), "unknown": {1, 2}}.get(self.kind, {"count": self.count})

    def set_extra_state(self, state: Any) -> None:
        self.count = int(state) if self.kind == "tensor" else state["count"]


def run(layer: nn.Module, room: Path, **train: Any) -> Trainer:
    config = ClassificationConfig(task="classification")
    config.data.size, config.data.batch, config.data.subset, config.data.augment = 8, 4, 40, "none"
    config.local.blocks, config.output.root, config.output.name = 2, str(room), "run"
    config.train.steps = 6
    for name, value in train.items():
        setattr(config.train, name, value)
    task = Classification(config)
    second = nn.Conv2d(8, 8, 3)
    nn.init.constant_(second.weight, 0.02)
    nn.init.zeros_(second.bias)
    task.build_chain = lambda initial=True: chain_of(layer, second)  # type: ignore[method-assign]
    return Trainer(config, task)


@pytest.mark.parametrize("layer", [Mask(), Extra("json"), Extra("tensor"), OwnState("buffer")])
def test_whatever_state_a_network_has_survives_a_checkpoint(layer: nn.Module, tmp_path: Path) -> None:
    """A constant that is infinite, extra state, and buffers outside of ``state_dict`` that training moves."""
    whole = run(layer, tmp_path / "whole")
    whole.fit()
    run(layer, tmp_path / "part", steps=3).fit()
    rest = run(layer, tmp_path / "part", resume="auto")
    rest.fit()
    for (name, ours), theirs in zip(whole.chain.model.named_parameters(), rest.chain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    other = chain_of(layer, nn.Conv2d(8, 8, 3)).model
    assert not torch.equal(other[0].convolution.weight, whole.chain.model[0].convolution.weight)
    assert load_model(tmp_path / "whole/run/checkpoints/step_6", other) == 6
    with torch.no_grad():
        image = torch.randn(1, 3, 8, 8)
        assert torch.equal(other[0].eval()(image), whole.chain.model[0].eval()(image))
    export_model(whole.chain.model, tmp_path / "model.pth")
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)


def test_state_that_no_checkpoint_can_hold_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^0: get_extra_state returns set, which no checkpoint can hold"):
        run(Extra("unknown"), tmp_path)
    assert not (tmp_path / "run").exists()


def test_what_becomes_infinite_in_training_is_still_refused(tmp_path: Path) -> None:
    made = run(Mask(), tmp_path)
    made.chain.model[0].register_buffer("other", torch.ones(2))
    assert made.blocks[0].infinite == {"0.mask"}
    made.chain.model[0].other.fill_(float("inf"))
    with pytest.raises(ValueError, match="^block 0: '0.other' is not finite at step 6"):
        made.fit()


@pytest.mark.parametrize(("count", "calls"), [(3, 2), (2, 0)])
def test_extra_state_of_auxiliary_networks_stays_with_their_blocks(count: int, calls: int, tmp_path: Path) -> None:
    """With other blocks it loaded into other auxiliary networks, which start fresh otherwise."""
    layers = nn.Conv2d(3, 3, 1), Extra("json"), nn.Conv2d(8, 8, 1)
    saved = blocks_of(chain_of(*layers), 3)
    for step in range(2):
        message = batch(step)
        for block in saved:
            message, _ = block.local_step(message)
    path = save_checkpoint(tmp_path, saved, Position(step=2), "glcan", keep=1)
    others = blocks_of(chain_of(*layers), count)
    load_checkpoint(path, others, "glcan", print)
    assert others[0].auxiliary.local_modules[0].count == calls
    assert others[0].chain.units[1].module.count == 2


def test_a_block_that_begins_with_group_norm_trains_on_channels_last_maps() -> None:
    """PyTorch crashes on a CPU: the process was gone without a word (timm's cpubone_nano)."""
    chain = chain_of(nn.Conv2d(3, 8, 1), nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)))
    chain.model.to(memory_format=torch.channels_last)
    child = os.fork()
    if not child:
        try:
            message = batch()
            for block in blocks_of(chain, 2, "greedy"):
                message, _ = block.local_step(message.with_x(message.x.to(memory_format=torch.channels_last)))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
