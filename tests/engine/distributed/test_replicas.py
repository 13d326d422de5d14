"""Replicas of a block: whatever they share, they train as one process does on the joined batch."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Config
from engine.distributed.replication import prepare_replicas
from engine.distributed.replication.batch_norm import synchronise
from engine.learning.block import Block
from engine.learning.build import build_blocks, prepare
from engine.learning.optimizer import set_rate
from engine.learning.outcome import BlockError
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from engine.utilities.batches import Part
from tests.ranks import run_ranks, values
from tests.toy import Toy, config

SIZES = (7, 8, 5, 7, 6, 9)
UPDATES = (True, False, True, True, False, True)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer__lr": 0.05},
    "sgd clipped": {"optimizer__lr": 0.05, "optimizer__clip_norm": 0.5},
    "adamw": {"optimizer__name": "adamw", "optimizer__lr": 0.01, "optimizer__weight_decay": 0.1},
    "adamw clipped, bf16": {"optimizer__name": "adamw", "optimizer__clip_norm": 0.5, "local__precision": "bf16"},
    "recomputed": {"local__recompute": "units"},
    "offloaded": {"local__offload": True},
    "fp16": {"local__precision": "fp16"},
}
ZERO = ["zero1", "zero2", "zero3", "zero1 offloaded", "zero2 offloaded", "zero3 offloaded"]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# DeepSpeed builds an extension when it is first used on a CPU: two minutes.
PARAMETERS = [
    pytest.param(kind, case, marks=[needs_deepspeed, pytest.mark.slow] if kind in ZERO else [])
    for kind in ["ddp", "fsdp", *ZERO]
    for case in CASES
    if kind == "ddp" or case != "fp16"
]
every_kind_and_case = pytest.mark.parametrize(("kind", "case"), PARAMETERS)


def on_replicas(work: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """``work(group, replica, *args)`` on two replicas that are ranks 1 and 2 of three; what each returns.

    Rank 0 only joins, as the rank of another stage would: nothing may be sent to it or expected of it.
    """
    return values(run_ranks(3, _rank, work, args, timeout=seconds))[1:]


def _rank(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    group, rank = dist.new_group([1, 2]), dist.get_rank()
    result = work(group, rank - 1, *args) if rank > 0 else None
    dist.barrier()
    dist.destroy_process_group()
    return result


def settings_of(kind: str, case: str) -> Config:
    name, *offloaded = kind.split()
    return config(
        local__blocks=2,
        placement__replicas=2,
        placement__replication=name,
        placement__offload_optimizer=bool(offloaded),
        **CASES[case],
    )


def made(settings: Config, group: Any = None) -> list[Block]:
    task = Toy(norm=True)
    blocks = build_blocks(task.build_chain(), settings, task)
    if group is None:
        prepare(blocks, settings, torch.device("cpu"))
    else:
        prepare_replicas(blocks, settings, torch.device("cpu"), group)
    if settings.local.precision == "fp16":
        for block in blocks:  # low enough that neither a part's gradients overflow nor the whole's
            block.scaler = torch.amp.GradScaler("cpu", init_scale=256)
    return blocks


def batch(number: int, size: int) -> Message:
    generator = torch.Generator().manual_seed(number)
    return Message({"x": torch.randn(size, 6, generator=generator)}, torch.randn(size, 1, generator=generator))


def part_of(message: Message, rank: int | None) -> Message:
    if rank is None:
        return message
    samples = Part(rank, 2).of(message.batch)
    return replace(message.with_x(message.x[samples]), targets=message.targets[samples])


def train(blocks: list[Block], rank: int | None = None, steps: range = range(len(SIZES))) -> dict[str, Any]:
    """Train on the micro-batches ``steps``, or on a replica's part of them; losses (weighted) and norms."""
    losses, norms = [], []
    first = 0
    for number in steps:
        last = next(n for n in range(number, len(SIZES)) if UPDATES[n])
        first = first if first <= number and not any(UPDATES[first:number]) else number
        message = part_of(batch(number, SIZES[number]), rank)
        message = replace(message, sequence=number)
        weight = message.batch * (1 if rank is None else 2) / sum(SIZES[first : last + 1])
        for block in blocks:
            set_rate(block.optimizer, 0.05 / (1 + number))
            message, report = block.local_step(message, update=UPDATES[number], weight=weight)
            losses.append(report.loss * weight)
            norms.append(report.gradient_norm)
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)}


@torch.no_grad()
def predict(blocks: list[Block], count: int) -> list[Tensor]:
    """Predictions of a block and of the whole, in evaluation mode as the trainer sets it."""
    for block in blocks:
        block.eval()
    found = []
    for number in range(count):
        between = blocks[0](batch(50 + number, 3))
        found += [blocks[0].predict(batch(50 + number, 3)), blocks[1].predict(between)]
    for block in blocks:
        block.train()
    return found


def states(blocks: list[Block]) -> dict[str, Tensor]:
    return {
        f"{kind} {name}": tensor.clone()
        for block in blocks
        for kind, tensors in block.state().items()
        for name, tensor in tensors.items()
    }


def load(blocks: list[Block], state: dict[str, Tensor]) -> None:
    kinds = {kind: {} for kind in ("model", "auxiliary", "optimizer")}
    for full, tensor in state.items():
        kind, name = full.split(" ", 1)
        kinds[kind][name] = tensor
    for block in blocks:
        block.load(**kinds)


def evaluated(blocks: list[Block], count: int) -> list[Tensor]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.gathered())
        return predict(blocks, count)


def whole_course(blocks: list[Block], rank: int | None, settings: Config, group: Any, alone: Any) -> dict[str, Any]:
    """Train, evaluate on the way and at the end, and go on from the state of a process of its own."""
    result: dict[str, Any] = {"fresh": states(blocks)}
    half = train(blocks, rank, range(3))
    result["half"] = states(blocks)
    evaluated(blocks, 1 + (rank or 0))  # each replica evaluates as much as it likes
    rest = train(blocks, rank, range(3, 6))
    result |= {name: torch.cat([half[name], rest[name]]) for name in half}
    result["trained"] = states(blocks)
    result["predictions"] = evaluated(blocks, 2)
    result["held"] = [held(block) for block in blocks]
    again = made(settings, group)
    for block in again:
        block.next_sequence = 3
    result["given"] = alone or result["half"]
    load(again, result["given"])
    result["loaded"] = states(again)
    train(again, rank, range(3, 6))
    result["resumed"] = states(again)
    kept = {name: value for name, value in result["given"].items() if not name.startswith("optimizer auxiliary.")}
    load(blocks, kept)  # over the state of training
    result["dropped"] = states(blocks)
    return result


def held(block: Block) -> tuple[int, int]:
    """Elements of parameters and of the optimizer's state that this process keeps between local steps."""

    def local(tensor: Any) -> int:
        return getattr(tensor, "ds_tensor", getattr(tensor, "_local_tensor", tensor)).numel()

    optimizer = getattr(block.optimizer, "optimizer", block.optimizer)
    state = [value for own in optimizer.state.values() for key, value in own.items() if key != "step"]
    return sum(local(p) for p in block.parameters()), sum(local(value) for value in state)


@functools.cache
def alone(case: str) -> dict[str, Any]:
    """The course of one process on whole batches."""
    settings = settings_of("ddp", case)
    return whole_course(made(settings), None, settings, None, None)


def _courses(group: Any, rank: int, kinds: list[str]) -> dict[tuple[str, str], Any]:
    found = {}
    for kind in kinds:
        for case in [case for case in CASES if kind == "ddp" or case != "fp16"]:
            settings = settings_of(kind, case)
            found[kind, case] = whole_course(made(settings, group), rank, settings, group, alone(case)["half"])
    return found


@functools.cache
def courses(zero: bool) -> list[dict[tuple[str, str], Any]]:
    return on_replicas(_courses, ZERO if zero else ["ddp", "fsdp"], seconds=600 if zero else 120)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], case: str) -> None:
    assert left.keys() == right.keys()
    tolerance = rounding(case)
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def rounding(case: str) -> float:
    return 1e-2 if case.endswith("16") else 2e-6


@every_kind_and_case
def test_replicas_train_as_one_process_on_the_joined_batch(kind: str, case: str) -> None:
    expected = alone(case)
    first, second = (course[kind, case] for course in courses(kind in ZERO))
    close = functools.partial(torch.testing.assert_close, rtol=rounding(case), atol=rounding(case))
    for found in (first, second):
        assert_close(found["trained"], expected["trained"], case)
        close(found["norms"], expected["norms"], equal_nan=True)
    close((first["losses"] + second["losses"]) / 2, expected["losses"])
    moved = max(float((expected["trained"][name] - old).abs().max()) for name, old in expected["fresh"].items())
    assert moved > 0.03, "or else nothing was compared"


@every_kind_and_case
def test_evaluation_sees_the_whole_block(kind: str, case: str) -> None:
    for course in courses(kind in ZERO):
        for found, expected in zip(course[kind, case]["predictions"], alone(case)["predictions"], strict=True):
            torch.testing.assert_close(found, expected, rtol=rounding(case), atol=rounding(case))


@every_kind_and_case
def test_state_goes_into_and_comes_out_of_replicas(kind: str, case: str) -> None:
    """Bit for bit, from a process of its own; and training goes on from it as it does alone."""
    for course in (made[kind, case] for made in courses(kind in ZERO)):
        given, dropped = course["given"], course["dropped"]
        assert course["loaded"].keys() == given.keys() == alone(case)["half"].keys()
        for name, tensor in course["loaded"].items():
            assert torch.equal(tensor, given[name]), name
        assert_close(course["resumed"], alone(case)["resumed"], case)
        gone = {name for name in given if name.startswith("optimizer auxiliary.")}
        assert gone
        for name, tensor in given.items():
            if name not in gone:
                assert torch.equal(tensor, dropped[name]), name
        # State that starts afresh is not there, or zero.
        assert not any(dropped[name].any() for name in gone & dropped.keys())


@every_kind_and_case
def test_replicas_keep_what_they_say(kind: str, case: str) -> None:
    whole = alone(case)["held"]
    shares = [course[kind, case]["held"] for course in courses(kind in ZERO)]
    for (parameters, state), *own in zip(whole, *shares, strict=True):
        for own_parameters, own_state in own:
            if kind.startswith(("fsdp", "zero3")):
                assert own_parameters < 0.6 * parameters
            else:
                assert own_parameters == parameters
            if kind != "ddp":
                assert own_state < 0.6 * state
            else:
                assert own_state == state


class Tokens(nn.Module):
    """A model with a parameter of its own, which a unit's module registers too."""

    class First(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.token = model.token

        def forward(self, x: Tensor) -> Tensor:
            return x + self.token

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.arange(6.0) / 10)
        self.output = nn.Linear(6, 1)


class TokenToy(Toy):
    def build_chain(self, initial: bool = True) -> Chain:
        torch.manual_seed(3)
        model = Tokens()
        units = [Unit("token", Tokens.First(model))]
        return Chain(model, units, Unit("output", model.output), Message({"x": torch.zeros(2, 6)}), layout="NLC")


def _tokens(group: Any, rank: int) -> tuple[dict[str, Tensor], ...]:
    settings = config(local__schedule="end_to_end", placement__replicas=2, placement__replication="fsdp")
    task = TokenToy()
    blocks = build_blocks(task.build_chain(), settings, task)
    prepare_replicas(blocks, settings, torch.device("cpu"), group)
    train(blocks, rank)
    with blocks[0].gathered():
        exported = {name: tensor.clone() for name, tensor in blocks[0].chain.model.state_dict().items()}
    return exported, {name: tensor.clone() for name, tensor in blocks[0].state()["model"].items()}


def test_fsdp_keeps_hold_of_a_parameter_outside_its_units() -> None:
    settings = config(local__schedule="end_to_end")
    task = TokenToy()
    blocks = build_blocks(task.build_chain(), settings, task)
    prepare(blocks, settings, torch.device("cpu"))
    train(blocks)
    expected = dict(blocks[0].chain.model.state_dict())
    for found in on_replicas(_tokens):
        for state in found:
            assert_close({name: state[name] for name in expected}, expected, "fp32")


def _dropout(group: Any, rank: int, kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    settings = config(local__blocks=2, placement__replicas=2, placement__replication=kind)
    task = Toy(dropout=0.5)
    blocks = build_blocks(task.build_chain(), settings, task)
    prepare_replicas(blocks, settings, torch.device("cpu"), group)
    losses = [block.local_step(batch(0, 8))[1].loss for block in blocks]
    return losses, states(blocks)


def test_replicas_draw_their_own_dropout_and_stay_equal() -> None:
    (losses, state), (others, other) = on_replicas(_dropout, "ddp")
    assert all(loss != own for loss, own in zip(losses, others, strict=True))
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def _accumulated(group: Any, rank: int, kind: str) -> list[Tensor | None]:
    blocks = made(config(local__blocks=2, placement__replicas=2, placement__replication=kind), group)
    blocks[0].local_step(part_of(batch(0, 8), rank), update=False)
    return [None if p.grad is None else p.grad.clone() for p in blocks[0].parameters()]


def test_nothing_is_averaged_before_the_update() -> None:
    ours, theirs = on_replicas(_accumulated, "ddp")
    assert not any(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
    for found in on_replicas(_accumulated, "fsdp"):
        assert found == [None] * len(ours), "shards get gradients when they are averaged"


class ActiveNorm(nn.BatchNorm2d):
    """Has a forward of its own, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return torch.relu(x)


def norms() -> nn.ModuleDict:
    torch.manual_seed(1)
    found = nn.ModuleDict(
        {
            "usual": nn.BatchNorm2d(3),
            "plain": nn.BatchNorm2d(3, affine=False),
            "cumulative": nn.BatchNorm2d(3, momentum=None),
            "without statistics": nn.BatchNorm2d(3, track_running_stats=False),
            "active": ActiveNorm(3),
            "frozen": nn.BatchNorm2d(3).eval(),
        }
    ).double()
    with torch.no_grad():
        for tensor in found.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return found


def normalised(modules: nn.ModuleDict, rank: int | None) -> dict[str, Any]:
    """Outputs, gradients and statistics of two passes; inputs have a mean far from 0."""
    result: dict[str, Any] = {}
    for name, module in modules.items():
        for number, size in enumerate((5, 2)):
            generator = torch.Generator().manual_seed(number)
            x, factor = (torch.randn(size, 3, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
            samples = slice(None) if rank is None else Part(rank, 2).of(size)
            x = (x * torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1) + 50)[samples].requires_grad_()
            y = module(x)
            (y.square() * factor[samples]).sum().backward()
            result[f"{name} {number}"] = (y.detach(), x.grad)
        result[f"{name} state"] = dict(module.state_dict())
        result[f"{name} gradients"] = {key: parameter.grad for key, parameter in module.named_parameters()}
    return result


def _norms(group: Any, rank: int) -> tuple[dict[str, Any], list[bool]]:
    modules = norms()
    kinds = [type(module) for module in modules.values()]
    synchronise(dict(modules.named_modules()), group)
    kept = [isinstance(module, kind) for module, kind in zip(modules.values(), kinds, strict=True)]
    result = normalised(modules, rank)
    alone = modules["usual"].eval()
    if rank == 0:  # in evaluation nothing is exchanged: this would wait for ever
        alone(torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    try:
        modules["active"](torch.zeros(1 - rank, 3, 1, 1, dtype=torch.float64))
    except ValueError as error:
        result["too few"] = str(error)
    return result, kept


def test_synchronised_batch_norm_is_batch_norm_on_the_joined_batch() -> None:
    expected = normalised(norms(), None)
    (first, kept), (second, _) = on_replicas(_norms)
    assert all(kept)
    for name, value in expected.items():
        if name.endswith("state"):
            assert value.keys() == first[name].keys()
            for key, tensor in value.items():
                torch.testing.assert_close(first[name][key], tensor, rtol=1e-12, atol=1e-12)
                assert torch.equal(first[name][key], second[name][key])
        elif name.endswith("gradients"):
            for key, tensor in value.items():
                torch.testing.assert_close(first[name][key] + second[name][key], tensor, rtol=1e-9, atol=1e-9)
        else:
            for joined, *parts in zip(value, first[name], second[name], strict=True):
                torch.testing.assert_close(torch.cat(parts), joined, rtol=1e-9, atol=1e-9)
    assert "more than 1 value per channel over all replicas" in first["too few"]


class NormHead(Toy):
    """The network's own head, which only the last block has, begins with a BatchNorm."""

    def build_chain(self, initial: bool = True) -> Chain:
        chain = super().build_chain(initial)
        chain.model.output = nn.Sequential(nn.BatchNorm1d(self.width), chain.model.output)
        return Chain(chain.model, chain.units, Unit("output", chain.model.output), chain.example, layout="NLC")


def _head_statistics(group: Any, rank: int | None) -> Tensor:
    settings, task = settings_of("ddp", "sgd"), NormHead()
    blocks = build_blocks(task.build_chain(), settings, task)
    if rank is None:
        prepare(blocks, settings, torch.device("cpu"))
    else:
        prepare_replicas(blocks, settings, torch.device("cpu"), group)
    train(blocks, rank)
    return states(blocks)["model output.0.running_var"]


def test_a_batch_norm_in_the_head_is_synchronised_too() -> None:
    alone = _head_statistics(None, None)
    for found in on_replicas(_head_statistics):
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"local__precision": "fp16", "placement__replication": "fsdp"},
            "local.precision: fp16 cannot be combined with placement.replication fsdp; use bf16",
        ),
        (
            {"local__precision": "fp16", "placement__replication": "zero2"},
            "local.precision: fp16 cannot be combined with placement.replication zero2; use bf16",
        ),
        (
            {"placement__offload_optimizer": True},
            "placement.offload_optimizer: needs placement.replication zero1, zero2 or zero3, not ddp",
        ),
        (
            {"placement__replication": "zero3", "placement__sync_batch_norm": False},
            "placement.replication: zero3 needs deepspeed .*pip install deepspeed, or use ddp or fsdp",
        ),
    ],
)
def test_refusals_name_both_keys(changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    store = dist.HashStore()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=words):
            made(config(placement__replicas=2, **changes), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _compiled(group: Any, rank: int, kinds: list[str]) -> list[dict[str, Tensor]]:
    found = []
    for kind in kinds:
        torch._dynamo.reset()
        settings = config(
            local__blocks=2, local__compile=True, placement__replicas=2, placement__replication=kind, optimizer__lr=0.05
        )
        task = Toy()
        blocks = build_blocks(task.build_chain(), settings, task)
        prepare_replicas(blocks, settings, torch.device("cpu"), group)
        train(blocks, rank)
        found.append(states(blocks))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["ddp", "fsdp"], pytest.param(["zero2", "zero3"], marks=needs_deepspeed)])
def test_compiled_replicas_train_alike(kinds: list[str]) -> None:
    settings = config(local__blocks=2, optimizer__lr=0.05)
    task = Toy()
    blocks = build_blocks(task.build_chain(), settings, task)
    prepare(blocks, settings, torch.device("cpu"))
    train(blocks)
    for found in on_replicas(_compiled, kinds, seconds=400):
        for state in found:
            assert_close(state, states(blocks), "fp32")


def _broken(group: Any, rank: int) -> tuple[str, str]:
    settings = config(local__blocks=2, optimizer__name="adamw", placement__replicas=2, placement__replication="zero2")
    block = made(settings, group)[0]
    block.local_step(batch(0, 4))
    state = block.state()
    with pytest.raises(ValueError) as unequal:
        block.load(**(state | {"optimizer": state["optimizer"] | {"layers.0.linear.bias:step": torch.tensor(5.0)}}))
    message = replace(batch(0, 4), sequence=1)
    message.x[0] = float("nan")
    with pytest.raises(BlockError) as infinite:
        block.local_step(message)
    return str(unequal.value), str(infinite.value)


@needs_deepspeed
@pytest.mark.slow
def test_what_deepspeed_would_pass_over_is_an_error() -> None:
    for unequal, infinite in on_replicas(_broken, seconds=400):
        assert "counts the steps of all parameters together, but 'layers.0.linear.bias' has taken 5" in unequal
        assert "block 0 failed at micro-batch 1: FloatingPointError: a gradient is not finite" in infinite
