"""Shared conditioning: one encoder, read by isolated blocks, trained by the sum of what they ask of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import Config
from engine.distributed.meet import join
from engine.distributed.placement import place
from engine.distributed.plan import plan_ranks
from engine.learning.build import build_blocks
from engine.learning.optimizer import state_by_name
from engine.learning.outcome import BlockError
from engine.learning.shared import SharedEncoder
from engine.memory.estimate import estimate_step
from engine.memory.footprint import count_bytes
from engine.memory.profile import Profile
from engine.memory.work import Speed
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.message import Message
from engine.network.shapes import shapes_of
from engine.run.export import export_model
from engine.run.trainer import Trainer
from tests.ranks import run_ranks, values
from tests.toy import Layer, Toy, assert_equal, blocks_of, config, state, train

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
PLAIN = {"optimizer__momentum": 0.0, "optimizer__nesterov": False}


class Conditioned(nn.Module):
    """Linear layers, each of which adds a code that an encoder makes of the input."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.encoder = Layer(width, width, 0.0, False)
        self.layers = nn.ModuleList(Layer(width, width, 0.0, False) for _ in range(depth))
        self.output = nn.Linear(width, 1)


def _encode(module: nn.Module, message: Message) -> Message:
    return replace(message, features={**message.features, "code": module(message.features["hint"])})


def _layer(module: nn.Module, message: Message) -> Message:
    return message.with_x(module(message.x + message.features["code"]))


class Scale(nn.Module):
    """A loss with a parameter of its own: the error's scale is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return ((prediction - targets).square() / self.scale.exp()).mean() + self.scale.sum()


class SharedToy(Toy):
    """The toy with an encoder that every layer reads, and on request a loss that learns."""

    def __init__(self, learns: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.learns = learns

    def build_chain(self, initial: bool = True) -> Chain:
        torch.manual_seed(3)
        model = Conditioned(self.depth, self.width)
        units = [Unit(f"layer{n}", layer, _layer, f"stage{n // 2}") for n, layer in enumerate(model.layers)]
        example = Message({"x": torch.zeros(2, self.width), "hint": torch.zeros(2, self.width)})
        shared = Unit("encoder", model.encoder, _encode)
        return Chain(model, units, Unit("output", model.output), example, "NLC", shared=shared, shared_names=["code"])

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Any]:
        return [Scale() if self.learns else self.loss for _ in spans]

    def example(self) -> Message:
        return self._hinted(super().example())

    def batches(self, *arguments: Any, **options: Any) -> Any:
        for lot in super().batches(*arguments, **options):
            yield [self._hinted(message) for message in lot]

    def test_batches(self) -> Any:
        for message in super().test_batches():
            yield self._hinted(message)

    def _hinted(self, message: Message) -> Message:
        return replace(message, features={"x": message.x, "hint": message.x.flip(1)})


def everything(blocks: Sequence[Any]) -> dict[str, Tensor]:
    found = state(blocks.learners)
    for block in blocks.learners:
        found |= state_by_name(block.optimizer, block.parameters_by_name())
    return found


def test_one_block_is_ordinary_backpropagation_to_the_bit() -> None:
    task = SharedToy()
    chain, _, schedule = blocks_of(
        task, config(local__schedule="end_to_end", optimizer__nesterov=False, optimizer__momentum=0.0)
    )
    plain = task.build_chain()
    settings = config().optimizer
    optimizer = torch.optim.SGD(plain.model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    message = task.example()
    schedule.step(message)
    task.loss(plain(message), message.targets).backward()
    before = plain.model.state_dict(keep_vars=True)
    assert all(parameter.grad is not None for parameter in before.values())
    optimizer.step()
    assert_equal(chain.model.state_dict(), plain.model.state_dict())


def test_the_encoder_learns_from_the_sum_of_all_blocks_gradients() -> None:
    """By hand: each block's loss alone, its input detached, differentiated by the code."""
    task = SharedToy()
    chain, blocks, schedule = blocks_of(task, config(local__blocks=4, **PLAIN))
    message = task.example()
    encoder = chain.model.encoder
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    code = encoder(message.features["hint"])
    x, total = message.x, torch.zeros_like(code)
    for block in blocks:
        leaf = code.detach().requires_grad_()
        output, prediction = block._forward(Message({"x": x, "hint": x, "code": leaf}, message.targets))
        total += torch.autograd.grad(task.loss(prediction, message.targets), leaf)[0]
        x = output.x.detach()
    wanted = torch.autograd.grad(code, list(encoder.parameters()), total)
    schedule.step(message)
    settings = config().optimizer
    for (name, parameter), gradient in zip(encoder.named_parameters(), wanted, strict=True):
        decayed = gradient + settings.weight_decay * before[name]
        torch.testing.assert_close(parameter, before[name] - settings.lr * decayed, msg=name)


def test_two_micro_batches_give_the_gradient_of_the_whole() -> None:
    """The code of the whole batch is made of two parts; losses are means, so each part counts one half."""
    settings = config(local__blocks=2, **PLAIN)
    whole, parts = (blocks_of(SharedToy(), settings) for _ in range(2))
    message = SharedToy().example()
    whole[2].step(message)
    for number, lot in enumerate(message.x.chunk(2)):
        targets = message.targets.chunk(2)[number]
        part = Message({"x": lot, "hint": lot.flip(1)}, targets, sequence=number)
        parts[2].step(part, update=number == 1, weight=0.5)
    for (name, one), other in zip(whole[0].model.named_parameters(), parts[0].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_every_block_has_a_leaf_of_its_own_and_leaves_no_gradient_behind() -> None:
    chain, blocks, schedule = blocks_of(SharedToy(), config(local__blocks=2))
    encoder = blocks.encoder
    assert [block.conditioning for block in blocks] == [(encoder,), (encoder,)]
    assert all(encoder not in list(block.modules()) for block in blocks), "it is no part of a block"
    collect, seen = encoder.collect, []
    encoder.collect = lambda leaves: (seen.append(leaves["code"]), collect(leaves))[1]
    out, _ = schedule.step(SharedToy().example())
    first, second = seen
    assert first is not second
    assert not torch.equal(first.grad, second.grad)
    assert torch.equal(first, second)
    assert out.features["code"].grad_fn is None
    assert all(parameter.grad is None for parameter in chain.model.parameters())
    assert "encoder" not in {name.split(".")[0] for name in blocks[0].named_state()}


def test_a_failing_encoder_is_named() -> None:
    _, blocks, schedule = blocks_of(SharedToy(), config(local__blocks=2))
    message = SharedToy().example()
    with pytest.raises(BlockError, match="block 2 failed at micro-batch 0: RuntimeError"):
        schedule.step(replace(message, features={**message.features, "hint": torch.zeros(8, 5)}))
    assert blocks[0].next_sequence == 0


def test_activations_of_the_encoder_can_be_offloaded() -> None:
    """With the same bits (a CPU has nowhere to offload them to, but takes the same way)."""
    kept, offloaded = (blocks_of(SharedToy(), config(local__blocks=2, local__offload=each)) for each in (False, True))
    for each in (kept, offloaded):
        each[2].step(SharedToy().example())
    assert_equal(state(kept[1].learners), state(offloaded[1].learners))


def test_a_cut_is_planned_around_the_encoder() -> None:
    """A profile is of the units; the encoder's bytes are there all the time, and a cut's estimate agrees with it."""
    settings, task = config(local__blocks=2, optimizer__name="adamw"), SharedToy(learns=True, width=64)
    profile = Profile(settings, task, Speed.infinite())
    assert len(profile) == 4
    blocks = build_blocks(task.build_chain(), settings, task)
    exact = estimate_step(blocks, settings, shapes_of(task.example)).footprint.peak_bytes
    found = profile.least + profile.state(0, 2) + max(profile.peak(0, 2, False), profile.peak(2, 4, False))
    assert found == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_runs_give_the_bits_of_uninterrupted_ones(tmp_path: Path, stop: int, learns: bool) -> None:
    def trainer(room: str, **changes: Any) -> Trainer:
        settings = config(train__epochs=3, train__save_every=1, local__blocks=2, optimizer__name="adamw", **changes)
        settings.output.root, settings.output.name = str(tmp_path / room), "run"
        return Trainer(settings, SharedToy(learns))

    whole = trainer("whole")
    whole.fit()
    trainer("part", train__steps=stop).fit()
    rest = trainer("part", train__resume="auto")
    assert rest.position.step == stop
    rest.fit()
    found = everything(rest.blocks)
    assert_equal(found, everything(whole.blocks))
    assert "encoder.linear.weight:exp_avg" in found
    assert ("auxiliary.1.criterion.scale:exp_avg" in found) == learns


def test_a_loss_that_learns_is_trained_and_dropped(tmp_path: Path) -> None:
    task = SharedToy(learns=True)
    chain, blocks, schedule = blocks_of(task, config(local__blocks=2))
    train(schedule, [task.example()] * 3)
    assert all(block.criterion.scale.item() != 0.5 for block in blocks)
    export_model(chain.model, tmp_path / "model.pth")
    assert torch.load(tmp_path / "model.pth").keys() == Conditioned(4, 6).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"local__schedule": "streams"}, "local.schedule"), ({"local__precision": "fp16"}, "local.precision")],
)
def test_what_an_encoder_cannot_share_is_refused(changes: dict[str, str], named: str) -> None:
    task = SharedToy()
    with pytest.raises(ValueError, match=rf"{named}: 'encoder' .*; use (sequential|bf16)$"):
        build_blocks(task.build_chain(), config(local__blocks=2, **changes), task)


def test_several_stages_are_refused_with_what_else_ranks_can_do() -> None:
    settings = config(local__blocks=2)
    with pytest.raises(ValueError, match=r"'encoder' learns from the gradients of all blocks.*placement.replicas 2"):
        place(settings, SharedToy(), _TwoStages(), 2, "encoder")


def test_ranks_are_not_planned_for_a_shared_encoder() -> None:
    with pytest.raises(ValueError, match=r"'encoder' learns from the gradients of all blocks.*placement.replicas 2"):
        plan_ranks(config(local__blocks=2), SharedToy(), 2, torch.device("cpu"))


class _TwoStages:
    stages, size = 2, 2


def _fit(settings: Config) -> dict[str, Tensor]:
    settings.output.name = "run"
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, SharedToy(learns=True), world)
        made.fit()
    kinds = [kind for block in made.blocks.learners for kind in block.state().values()]  # whole, whoever holds it
    found = {name: tensor.clone() for tensors in kinds for name, tensor in tensors.items() if ":" not in name}
    world.leave()
    return found


def _two(room: str, replication: str) -> dict[str, Tensor]:
    settings = config(local__blocks=2, placement__replicas=2, placement__replication=replication, train__steps=3)
    settings.output.root = room
    return _fit(settings)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow])])
def test_replicas_average_the_encoders_gradient(tmp_path: Path, kind: str) -> None:
    one = config(local__blocks=2, train__steps=3)
    one.output.root = str(tmp_path / "one")
    alone = _fit(one)
    found = values(run_ranks(2, _two, str(tmp_path / "two"), kind, timeout=400))
    for name, tensor in alone.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], tensor, msg=name)


def test_bytes_on_fake_tensors_are_those_of_real_ones() -> None:
    settings = config(local__blocks=2, optimizer__name="adamw")
    task = SharedToy(learns=True, width=64)
    _, blocks, _ = blocks_of(task, settings)
    real = count_bytes(blocks, settings, task.example().map(torch.clone))
    fake = estimate_step(build_blocks(task.build_chain(), settings, task), settings, shapes_of(task.example)).footprint
    assert fake.peak == real.peak
    assert fake.by_block == real.by_block
    # The encoder's weight and bias, its gradients and AdamW's two moments and step are counted with the network's.
    without = count_bytes(blocks_of(Toy(width=64), settings)[1], settings, Toy(width=64).example())
    assert real.peak["parameters"] - without.peak["parameters"] == 64 * 64 * 4 + 512
    assert real.peak["loss"] > 0


def test_the_encoder_is_named_and_numbered_after_the_blocks() -> None:
    _, blocks, _ = blocks_of(SharedToy(), config(local__blocks=2))
    encoder = blocks.encoder
    assert isinstance(encoder, SharedEncoder)
    assert (encoder.index, encoder.title) == (2, "encoder")
    assert sorted(encoder.named_state()) == ["encoder.linear.bias", "encoder.linear.weight"]


def test_a_block_clips_its_own_gradients_while_the_encoders_wait() -> None:
    """When a block clips in the second of two micro-batches, the encoder's gradients of the first are there."""
    task = SharedToy()
    settings = config(local__blocks=2, train__accumulate=2, optimizer__clip_norm=0.01)
    _, blocks, schedule = blocks_of(task, settings)
    assert blocks.encoder is not None
    parts = [*blocks, blocks.encoder]
    counted = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert counted == sum(tensor.numel() for part in parts for tensor in part.named_state().values())
    norms, kept = {}, []
    for block in blocks:

        def train_update(block: Any = block, plain: Any = block.train_update) -> Tensor:
            own = [parameter.grad for _, parameter in block.parameters_by_name() if parameter.grad is not None]
            norms[block.index] = torch.stack([gradient.norm() for gradient in own]).norm()
            waiting = [parameter.grad.clone() for _, parameter in blocks.encoder.parameters_by_name()]
            norm = plain()
            after = [parameter.grad for _, parameter in blocks.encoder.parameters_by_name()]
            kept.append(all(torch.equal(*pair) for pair in zip(waiting, after, strict=True)))
            return norm

        block.train_update = train_update  # type: ignore[method-assign]
    for number in range(2):
        _, reports = schedule.step(replace(task.example(), sequence=number), update=number == 1, weight=0.5)
    assert kept == [True, True], "a block leaves the encoder's gradients alone"
    for report in reports:
        torch.testing.assert_close(report.gradient_norm, norms[report.block])
