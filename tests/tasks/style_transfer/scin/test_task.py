"""Style transfer through the engine: exact, resumable, wherever its blocks run."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import parse
from engine.learning.build import build_blocks
from engine.memory.estimate import estimate_step
from engine.memory.footprint import Footprint, count_bytes
from engine.network.message import Message
from engine.network.shapes import shapes_of
from tasks import find_task, load
from tasks.style_transfer.images import read_image, write_image
from tasks.style_transfer.scin.config import SCINConfig
from tasks.style_transfer.scin.losses import NetworkLoss
from tasks.style_transfer.scin.network import network_chain
from tasks.style_transfer.scin.task import SCINTransfer
from tests.ranks import run_ranks, values
from tests.runs import course, fit, joined, words
from tests.shared import SHARED, needs_shared
from tests.tasks.style_transfer.scin.networks import SMOKE, model, scin
from tests.toy import assert_equal, blocks_of, state
from tools import evaluate, export, plan, stylize

CONFIGS = sorted(Path("tasks/style_transfer/scin/configs").glob("*.yaml"))
CUT = ["stage1", "stage2", "stage3"]
SMALL = ("--data.tests", "1", "--data.sheet", "1", "--data.batch", "2", "--train.steps", "2")
# Without a shared encoder nothing has to come back, and ranks can be a pipeline.
FROZEN = ("--model.style_encoder", "vgg", *SMALL)


def task_of(**changes: Any) -> SCINTransfer:
    return SCINTransfer(scin(**changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Room and state of an uninterrupted run; tests that write into the room copy it."""
    room = tmp_path_factory.mktemp("finished")
    return room, fit(SMOKE, room, *SMALL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_complete_and_named_by_their_task(path: Path) -> None:
    config = parse(find_task("style_transfer/scin").config, ["--config", str(path)])
    assert config.task == "style_transfer/scin"
    assert config.optimizer.name == "adamw"


def test_one_block_is_the_plain_training_step_to_the_bit() -> None:
    """Two steps of the engine, and of a loop as anyone would write it."""
    settings = scin(local__schedule="end_to_end")
    task = SCINTransfer(settings)
    _, blocks, schedule = blocks_of(task, settings)
    plain = SCINTransfer(settings)
    network = plain.build_chain().model
    (criterion,) = plain.criteria(network_chain(network), [blocks[0].span])
    assert isinstance(criterion, NetworkLoss)
    parts = [list(network.pe.parameters()), [p for n, p in network.named_parameters() if not n.startswith("pe.")]]
    parts[1] += list(criterion.parameters())
    optimizers = [torch.optim.AdamW(part, 1e-3, (0.9, 0.999), weight_decay=0.0, foreach=True) for part in parts]
    for sequence in range(2):
        message = task.example()
        _, (report,) = schedule.step(Message(message.features, message.targets, sequence=sequence))
        loss = criterion(network_chain(network)(message), message.targets)
        loss.backward()
        assert torch.equal(report.loss, loss.detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(dict(blocks[0].chain.model.state_dict()), dict(network.state_dict()))


def test_vgg_does_not_change_by_a_bit_and_everything_else_learns() -> None:
    task = task_of(local__cut=CUT)
    chain, blocks, schedule = blocks_of(task, task.config)
    before = {name: tensor.clone() for name, tensor in state(blocks.learners).items()}
    frozen = {name: tensor.clone() for name, tensor in blocks[-1].criterion.perception.vgg.named_buffers()}
    for sequence in range(2):  # scale and bias start at 0 and hold the transformers' gradients back for a step
        schedule.step(Message(task.example().features, task.example().targets, sequence=sequence))
    for name, tensor in state(blocks.learners).items():
        assert torch.equal(tensor, before[name]) == name.startswith("vgg."), name
    for name, tensor in blocks[0].criterion.perception.vgg.named_buffers():
        assert torch.equal(tensor, frozen[name])
    assert blocks[0].criterion.perception.vgg is blocks[-1].criterion.perception.vgg
    assert chain.model.vgg is not blocks[0].criterion.perception.vgg


def gradients(task: SCINTransfer, **changes: Any) -> dict[str, Tensor]:
    settings = scin(**changes)
    _, blocks, schedule = blocks_of(task, settings)
    schedule.step(task.example(), update=False)
    found = {name: p.grad for block in blocks.learners for name, p in block.parameters_by_name()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(
    "changes", [{"local__cut": CUT}, pytest.param({"local__schedule": "end_to_end"}, marks=pytest.mark.slow)]
)
def test_recomputing_activations_changes_no_gradient(changes: dict[str, Any]) -> None:
    kept, recomputed = (gradients(task_of(), **changes, local__recompute=each) for each in ("none", "units"))
    assert len(kept) > 50
    for name, gradient in kept.items():  # biases before a normalisation have none but rounding
        assert (recomputed[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5, name


WAYS: dict[str, dict[str, Any]] = {
    "local": {"local__cut": ["stage1", "stage3"]},  # a block of each kind: first, middle, last
    "end to end": {"local__schedule": "end_to_end"},
}


@functools.cache
def estimated(way: str, recompute: str) -> Footprint:
    """The footprint of a step on fake tensors."""
    task = task_of(**WAYS[way], local__recompute=recompute)
    blocks = build_blocks(task.build_chain(initial=False), task.config, task)
    return estimate_step(blocks, task.config, shapes_of(task.example)).footprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "recompute"),
    [
        ("local", "units"),
        ("end to end", "none"),
        ("local", "none"),
        ("end to end", "units"),
    ],
)
def test_bytes_on_fake_tensors_are_those_of_real_ones(way: str, recompute: str) -> None:
    task = task_of(**WAYS[way], local__recompute=recompute)
    real = count_bytes(blocks_of(task, task.config)[1], task.config, task.example())
    fake = estimated(way, recompute)
    assert fake.peak == real.peak
    assert fake.by_block == real.by_block
    assert real.peak["loss"] > 0


@pytest.mark.slow
def test_blocks_save_memory_and_recomputation_saves_more() -> None:
    whole, recomputed = (estimated("end to end", each).peak_bytes for each in ("none", "units"))
    local, both = (estimated("local", each).peak_bytes for each in ("none", "units"))
    assert recomputed < whole
    assert both < local < whole


def test_ranks_give_the_bits_of_one_process(tmp_path: Path) -> None:
    alone = fit(SMOKE, tmp_path / "one", *FROZEN)
    found = values(run_ranks(2, fit, SMOKE, tmp_path / "two", *FROZEN, "--placement.stages", "[0, 0, 1, 1]"))
    assert_equal(joined(found), joined([alone]))
    assert course(tmp_path / "two", "style_loss") == course(tmp_path / "one", "style_loss")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_replicas_share_batches_and_agree(tmp_path: Path, kind: str) -> None:
    """Each contrasts its own pairs, so the figures are not one process's; but both must have the same weights."""
    options = "--placement.replicas", "2", "--data.batch", "4", "--placement.replication", kind
    found = values(run_ranks(2, fit, SMOKE, tmp_path, *SMALL, *options, timeout=300))
    assert any(name.startswith("pe.") for name in found[0])
    assert_equal(*found)


@pytest.mark.slow
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    finished: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, whole = finished
    fit(SMOKE, tmp_path, *SMALL, "--train.steps", "1")
    rest = fit(SMOKE, tmp_path, *SMALL, "--train.resume", "auto")
    assert_equal(rest, whole)
    assert any("discriminators" in name and name.endswith("exp_avg") for name in rest)


def test_from_training_to_pictures(finished: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """A run is evaluated, exported and painted with; the files are what the commands say."""
    run = shutil.copytree(finished[0] / "run", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["metric"], summary["blocks"]) == ("style_transfer/scin", "style_loss", 4)
    assert (run / "evaluation/step_2/sheet.png").is_file()
    evaluate.main(["--run", str(run)])
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["style_loss"] == pytest.approx(summary["value"], rel=1e-5)
    assert set(figures) >= {"style_loss", "content_loss", "ssim"}
    export.main(["--run", str(run), "--out", str(tmp_path / "model.pth")])
    _, task = load(["--config", str(run / "config.yaml")])
    network = task.build_chain(initial=False).model
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    for name in ("content", "style"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "content/hill.png", (torch.rand(30, 50, 3) * 255).byte().numpy())
    write_image(tmp_path / "style/waves.png", (torch.rand(40, 40, 3) * 255).byte().numpy())
    places = {"--content": tmp_path / "content", "--style": tmp_path / "style", "--run": run, "--out": tmp_path / "out"}
    stylize.main([word for key, place in places.items() for word in (key, str(place))])
    assert read_image(tmp_path / "out/hill_waves.png").shape == (30, 50, 3)
    assert (tmp_path / "out/sheet.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.batch", "1"], r"^data.batch: 1 pair.* no negatives .*; the least is 2, or set loss.contrastive 0$"),
        (["--data.crop", "72"], r"^data.crop: 72; the network needs a multiple of 16$"),
        (["--data.resize", "48"], r"^data.resize: 48 is too small; the least is 64$"),
        (["--data.name", "folders"], r"^data.contents, data.styles: data.name folders needs at least one folder each$"),
        (["--data.contents", "[x]"], r"^data.name: photographs reads no folders; set data.name folders$"),
        (["--loss.style", "-1"], r"^loss.style: -1.0 is too small; the least is 0$"),
        (["--loss.temperature", "0"], r"^loss.temperature: 0.0 must be above 0$"),
        (["--loss.style_layers", "[]"], r"^loss.style_layers, loss.content_layers: name at least one layer"),
        (["--model.scin_width", "30"], r"^model.scin_width: 30 is not a multiple of 4"),
        (["--train.accumulate", "3"], r"^train.accumulate: 3 does not divide data.batch, 4$"),
        (["--data.fid_weights", "x"], r"^data.fid_weights: ArtFID needs LPIPS too; set data.lpips alex$"),
        (["--local.precision", "fp16"], r"^local.precision: 'pe' sums the gradients .*; use bf16$"),
        (["--data.batch", "20"], r"^data.batch: 20 pairs, but there are 12 photographs .*; take fewer, or raise"),
        (["--local.auxiliary", "dgl"], r"^local.auxiliary: 'dgl' is not for style_transfer/scin; known: glcan, greedy"),
        (["--loss.style_layers", "[relu9_1]"], r"^'relu9_1' is not a layer of vgg16; its layers are"),
        (["--placement.replicas", "3"], r"^placement.replicas: 3 do not divide the 4 pairs of a micro-batch; choose"),
        (
            ["--model.transfer", "adain", "--model.normalisation", "none"],
            r"^model.style_encoder: without attention and SCIN nothing reads pe; set it to vgg$",
        ),
        (["--loss.clip", "/nowhere"], r"^loss.clip: no CLIP model can be loaded from '/nowhere'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(SMOKE, tmp_path, *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_stages_need_a_frozen_style_encoder(tmp_path: Path) -> None:
    found = run_ranks(2, fit, SMOKE, tmp_path, *SMALL)
    assert [each.code for each in found] == [2, 2]
    assert any("'pe' learns from the gradients of all blocks" in each.said for each in found)


def test_identities_are_no_more_than_pairs() -> None:
    task = task_of(data__batch=2)
    for asked, rows in ((0, 8), (1, 6), (5, 8)):
        task.config.loss.identity_pairs = asked
        assert task.example().batch == rows
    task.config.loss.identity = task.config.loss.identity_features = 0.0
    assert task.example().batch == 4


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["pe", "vgg"])
def test_cuts_are_planned(tmp_path: Path, encoder: str) -> None:
    target = tmp_path / "plan.yaml"
    plan.main(["--config", SMOKE, "--memory", "1GiB", "--out", str(target), "--model.style_encoder", encoder])
    config, task = load(["--config", str(target)])
    assert build_blocks(task.build_chain(), config, task)


def test_only_what_a_later_block_reads_travels() -> None:
    """With a frozen style encoder the painting's maps end at the transfer; AdaIN's network has none at all."""
    names = {}
    for kind, changes in {"vgg": {}, "adain": {"transfer": "adain", "normalisation": "none"}}.items():
        settings = scin()
        settings.model = model(style_encoder="vgg", **changes)
        chain = SCINTransfer(settings).build_chain(initial=False)
        names[kind] = set(chain.shapes()[1].features)
    assert names["vgg"] == {"x", "style", "content", "style_code"}
    assert names["adain"] == {"x", "style", "content", "style_statistics"}


@pytest.mark.slow
@needs_shared("data")
def test_real_photographs_and_paintings_lower_the_losses(tmp_path: Path) -> None:
    """A few steps on one batch of Van Goghs with real VGG features, at the default learning rate of the config."""
    overrides = {
        "--data.crop": 64,
        "--data.resize": 80,
        "--data.batch": 2,
        "--local.precision": "fp32",
        "--model.vgg.weights": SHARED / "weights/vgg16_relu4_1_fp16.safetensors",
        "--data.contents": f"[{SHARED}/data/style/content]",
        "--data.styles": f"[{SHARED}/data/style/vangogh]",
    }
    path = "tasks/style_transfer/scin/configs/paintings_scin_k2_glcan.yaml"
    config, task = load(words(path, tmp_path, *(str(word) for item in overrides.items() for word in item)))
    assert isinstance(config, SCINConfig)
    _, _, schedule = blocks_of(task, config)
    (message,) = next(task.batches(0, 0))
    losses = []
    for sequence in range(12):
        _, reports = schedule.step(Message(message.features, message.targets, sequence=sequence))
        losses.append([float(report.loss) for report in reports])
    for block in range(2):
        assert losses[-1][block] < 0.8 * losses[0][block], block
