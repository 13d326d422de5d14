"""The pipeline: on any number of ranks the bits of one process, and checkpoints that any other number goes on from."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine.config import Config
from engine.distributed.meet import join
from engine.run.trainer import Trainer
from engine.task import Task
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification
from tests.ranks import run_ranks, values
from tests.toy import Toy, assert_equal, config


def digits(room: Path, model: str, **changes: Any) -> Config:
    """A real network on real scans, for 3 epochs of 4 steps, the last of them short."""
    settings = ClassificationConfig(task="classification")
    settings.model.name, settings.data.size, settings.data.augment = model, 16, "none"
    settings.data.subset, settings.data.batch = 58, 16
    settings.local.blocks, settings.train.steps, settings.train.log_every = 4, 12, 1
    return changed(settings, room, **changes)


def toy(room: Path, **changes: Any) -> Config:
    settings = config(local__blocks=4, train__epochs=3, train__log_every=1)
    return changed(settings, room, **changes)


def changed(settings: Any, room: Path, **changes: Any) -> Any:
    settings.output.root, settings.output.name = str(room), "run"
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(settings, section), key, value)
    return settings


def task_of(settings: Config) -> Task:
    if isinstance(settings, ClassificationConfig):
        return Classification(settings)
    return Toy(dropout=0.3, norm=True, width=8)


def fit(settings: Config) -> dict[str, Any]:
    """One rank's part of a run: state of its blocks and optimizers, and the summary."""
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, task_of(settings), world)
        summary = made.fit()
    state = {}
    for block in made.blocks:
        for tensors in block.state().values():
            state.update({name: tensor.clone() for name, tensor in tensors.items()})
    world.leave()
    return {"state": state, "summary": summary, "blocks": [block.index for block in made.blocks]}


def joined(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part["state"].items()}


def losses(room: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (room / "run/metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def figures(room: Path) -> list[float]:
    lines = [json.loads(line) for line in (room / "run/metrics.jsonl").read_text().splitlines()]
    return [line.get("accuracy", line.get("error")) for line in lines if "train_loss" not in line]


NETWORKS = {
    "toy": toy,
    "resnet14": lambda room, **changes: digits(room, "resnet14", **changes),
    "vit with dropout": lambda room, **changes: digits(
        room, "tests.engine.distributed.test_pipeline:vit", optimizer__name="adamw", optimizer__lr=1e-3, **changes
    ),
    "skips": lambda room, **changes: digits(
        room, "tests.engine.distributed.test_pipeline:skips", local__auxiliary="greedy", **changes
    ),
}


def vit(classes: int, size: int) -> Any:
    """A timm ViT, narrow and of 4 blocks, whose dropout is on."""
    import timm

    from tasks.classification.timm_chain import timm_chain

    small = functools.partial(timm.create_model, depth=4, embed_dim=48, num_heads=3)
    with mock.patch.object(timm, "create_model", small):
        chain = timm_chain("vit_tiny_patch16_224", classes, size, False)
    for module in chain.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return chain


def skips(classes: int, size: int) -> Any:
    """A toy with a long skip and shared conditioning, which pass through blocks that do not read them."""
    from torch import nn

    from engine.network.chain import Chain, Unit
    from engine.network.message import Message

    model = nn.ModuleDict({f"layer{n}": nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(4)})
    model["gain"], model["head"] = nn.Linear(3, 8), nn.Linear(8, classes)

    def stem(module: Any, message: Message) -> Message:
        convolution, gain = module
        condition = gain(message.x.mean((2, 3)))
        x = convolution(message.x)
        return Message({"x": x, "skip": x, "condition": [condition]}, message.targets, message.bank, message.sequence)

    def middle(module: Any, message: Message) -> Message:
        condition = message.features["condition"][0][:, :, None, None]
        return message.with_x(torch.relu(module(message.x)) * (1 + condition))

    def end(module: Any, message: Message) -> Message:
        return message.with_x(module(message.x) + message.features["skip"])

    units = [Unit("stem", nn.ModuleList([model["layer0"], model["gain"]]), stem, "a")]
    units += [Unit(f"layer{n}", model[f"layer{n}"], middle, "a") for n in (1, 2)]
    units += [Unit("layer3", model["layer3"], end, "a")]
    head = Unit("head", model["head"], lambda module, message: message.with_x(module(message.x.mean((2, 3)))))
    return Chain(model, units, head, Message({"x": torch.zeros(2, 3, size, size)}))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name == "resnet14" else []) for name in NETWORKS],
)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network trained in one process."""
    room = tmp_path_factory.mktemp("alone")
    (part,) = values(run_ranks(1, fit, NETWORKS[request.param](room)))
    assert part["summary"]["schedule"] == "sequential"
    return request.param, part["state"], losses(room), figures(room)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_any_number_of_ranks_gives_the_bits_of_one_process(alone: Any, ranks: int, tmp_path: Path) -> None:
    name, state, curve, tested = alone
    parts = values(run_ranks(ranks, fit, NETWORKS[name](tmp_path)))
    assert sorted(index for part in parts for index in part["blocks"]) == [0, 1, 2, 3]
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(state.items())))
    assert losses(tmp_path) == curve
    assert len(curve) == 12
    assert figures(tmp_path) == tested
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["schedule"], summary["world_size"], summary["blocks"]) == ("pipeline", ranks, 4)
    assert [rank["rank"] for rank in summary["ranks"]] == list(range(ranks))
    assert "<svg" not in (tmp_path / "run/timeline.json").read_text()
    assert "data:image/svg+xml" in (tmp_path / "run/pipeline.html").read_text()


def test_streams_give_the_bits_of_one_block_after_another(alone: Any, tmp_path: Path) -> None:
    name, state, curve, _ = alone
    (part,) = values(run_ranks(1, fit, NETWORKS[name](tmp_path, local__schedule="streams")))
    assert_equal(part["state"], state)
    assert losses(tmp_path) == curve
    assert part["summary"]["schedule"] == "streams"


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def test_a_run_goes_on_with_any_number_of_ranks(alone: Any, ranks: int, tmp_path: Path) -> None:
    """From 3 ranks, in the middle of an epoch."""
    name, state, curve, _ = alone
    if name not in ("toy", "resnet14"):
        pytest.skip("two networks are enough")
    values(run_ranks(3, fit, NETWORKS[name](tmp_path, train__steps=7)))
    parts = values(run_ranks(ranks, fit, NETWORKS[name](tmp_path, train__resume="auto")))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(state.items())))
    assert losses(tmp_path) == curve
    assert (tmp_path / "run-2").exists() is False


@pytest.mark.slow
def test_accumulation_and_clipping_in_a_pipeline(tmp_path: Path) -> None:
    changes = {"train__accumulate": 2, "optimizer__clip_norm": 0.5, "train__steps": 6, "data__subset": 40}
    changes |= {"optimizer__name": "adamw", "optimizer__lr": 0.01}
    (whole,) = values(run_ranks(1, fit, digits(tmp_path / "1", "resnet14", **changes)))
    parts = values(run_ranks(2, fit, digits(tmp_path / "2", "resnet14", **changes)))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(whole["state"].items())))
    assert losses(tmp_path / "1") == losses(tmp_path / "2")


def test_stages_by_config_and_their_own_order(tmp_path: Path) -> None:
    parts = values(run_ranks(2, fit, toy(tmp_path, placement__stages=[0, 0, 0, 1])))
    assert [part["blocks"] for part in parts] == [[0, 1, 2], [3]]


def test_fewer_messages_than_ranks(tmp_path: Path) -> None:
    (whole,) = values(run_ranks(1, fit, toy(tmp_path / "1", train__steps=1)))
    parts = values(run_ranks(4, fit, toy(tmp_path / "4", train__steps=1)))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(whole["state"].items())))


def test_only_a_stages_own_parameters_take_memory(tmp_path: Path) -> None:
    assert values(run_ranks(2, _held, toy(tmp_path)))[0] == [True, True, False, False]


def _held(settings: Config) -> list[bool]:
    settings.placement.stages = [0, 0, 1, 1]
    world = join(settings.placement, "cpu")
    made = Trainer(settings, task_of(settings), world)
    held = [not any(tensor.is_meta for tensor in block.parameters()) for block in made.all_blocks]
    world.leave()
    return held


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_replicas_of_stages_equal_one_process_to_rounding(way: str, tmp_path: Path) -> None:
    """Two stages of two replicas, BatchNorm over both, an odd last batch; and a resume without replicas."""
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    # Later steps tell rounding apart no longer: of the digits' even background whole areas cross a ReLU at once.
    changes = {"data__subset": 57, "data__batch": 18, "train__steps": 4, "optimizer__lr": 0.01}
    replicated = {"placement__replicas": 2, "placement__replication": way, "placement__stages": [0, 0, 1, 1]}
    (whole,) = values(run_ranks(1, fit, digits(tmp_path / "1", "resnet14", **changes)))
    parts = values(run_ranks(4, fit, digits(tmp_path / "4", "resnet14", **changes, **replicated), timeout=400))
    assert [part["blocks"] for part in parts] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for replica in (0, 1):
        _close(joined(parts[replica::2]), whole["state"], 1e-5)
    assert losses(tmp_path / "4") == [pytest.approx(values, rel=1e-5) for values in losses(tmp_path / "1")]
    assert figures(tmp_path / "4") == pytest.approx(figures(tmp_path / "1"), abs=0.02)
    more = {**changes, "train__steps": 5, "train__resume": "auto"}
    (rest,) = values(run_ranks(1, fit, digits(tmp_path / "4", "resnet14", **more)))
    (both,) = values(run_ranks(1, fit, digits(tmp_path / "1", "resnet14", **more)))
    _close(rest["state"], both["state"], 1e-2)
    more = {**changes, **replicated, "train__steps": 7, "train__resume": "auto"}
    again = values(run_ranks(4, fit, digits(tmp_path / "4", "resnet14", **more), timeout=400))
    assert again[0]["summary"]["steps"] == 7


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of each tensor's norm."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        distance = (found[name].double() - tensor.double()).norm()
        assert distance <= tolerance * max(1.0, float(tensor.double().norm())), name
