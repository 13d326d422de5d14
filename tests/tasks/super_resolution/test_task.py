"""Super-resolution by the project's own tools."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from spandrel import ModelLoader

from engine.learning.build import build_blocks, prepare
from engine.learning.schedules import SCHEDULES
from engine.memory.estimate import estimate_step
from engine.memory.footprint import count_bytes
from engine.network.shapes import shapes_of
from engine.utilities.batches import Part
from tasks import load
from tests.ranks import run_ranks, values
from tests.runs import course, fit, joined, words
from tests.tasks.super_resolution.networks import SMALL, small_network, small_task, write_images
from tests.toy import assert_equal
from tools import evaluate, export, plan, train

SMOKE = "tasks/super_resolution/configs/smoke.yaml"
FAST = ("--train.log_every", "1", "--data.repeat", "5")
"""15 patches, four steps an epoch, the last of three."""


def few(root: Path, scale: int = 2) -> tuple[str, ...]:
    """Three small images to train on and one to test on, in place of photographs, which take long to enlarge."""
    sides = {"train": {"a": (96, 80), "b": (64, 112), "c": (80, 80)}, "test": {"d": (72, 104)}}
    for split, images in sides.items():
        write_images(root / split, {f"{name}.png": side for name, side in images.items()})
        low = {f"{name}.png": (height // scale, width // scale) for name, (height, width) in images.items()}
        write_images(root / f"{split}_low", low)
    folders = {key: key for split in sides for key in (split, f"{split}_low")}
    data = {"name": "files", "root": root, "tile": "24", **folders}
    return tuple(word for key, value in data.items() for word in (f"--data.{key}", str(value)))


@pytest.fixture(scope="module", params=["EDSR", pytest.param("SwinIR", marks=pytest.mark.slow)])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    room = tmp_path_factory.mktemp("alone")
    options = {**SMALL[request.param], **({"drop_rate": 0.1} if request.param == "SwinIR" else {})}
    named = ("--model.name", request.param, "--model.options", json.dumps(options))
    network = (*few(room / "images"), *FAST, *named, "--train.steps", "4")
    (state,) = values(run_ranks(1, fit, SMOKE, room, *network))
    return network, joined([state]), course(room, "psnr")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_bits_of_one_process(alone: Any, ranks: int, tmp_path: Path) -> None:
    network, state, logged = alone
    assert_equal(joined(values(run_ranks(ranks, fit, SMOKE, tmp_path, *network))), state)
    assert course(tmp_path, "psnr") == logged


@pytest.mark.parametrize("replication", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_replicas_learn_what_one_process_does(replication: str, tmp_path: Path) -> None:
    """With the tail in parts, which is computed again in backward."""
    sgd = ("--optimizer.name", "sgd", "--optimizer.lr", "0.01", "--train.steps", "2", "--data.repeat", "4")
    parts = (*few(tmp_path / "images"), *sgd, "--model.tail_parts", "2", "--data.tile", "0", "--data.pictures", "0")
    (alone,) = values(run_ranks(1, fit, SMOKE, tmp_path / "alone", *parts))
    shared = ("--placement.replicas", "2", "--placement.replication", replication)
    first, second = values(run_ranks(2, fit, SMOKE, tmp_path / "two", *parts, *shared))
    assert_equal(first, second)
    assert alone.keys() == first.keys()
    assert all(torch.allclose(first[name], alone[name], rtol=1e-3, atol=1e-5) for name in alone)


def test_a_run_goes_on_with_another_number_of_ranks(alone: Any, tmp_path: Path) -> None:
    network, state, logged = alone
    values(run_ranks(2, fit, SMOKE, tmp_path, *network[:-1], "2"))
    (again,) = values(run_ranks(1, fit, SMOKE, tmp_path, *network, "--train.resume", "auto"))
    assert_equal(joined([again]), state)
    assert course(tmp_path, "psnr")[-1] == logged[-1]


SPANDRELS = {
    "RRDBNet": ("ESRGAN", {"num_feat": 64, "num_block": 2, "num_grow_ch": 32}),
    "SwinIR": ("SwinIR", {**SMALL["SwinIR"], "img_range": 1.0, "mlp_ratio": 2}),
}


@pytest.mark.parametrize("kind", SPANDRELS)
def test_an_export_is_what_basicsr_and_spandrel_load(kind: str, tmp_path: Path) -> None:
    name, options = SPANDRELS[kind]
    network = ("--model.name", kind, "--model.options", json.dumps(options), "--model.scale", "4")
    images = few(tmp_path / "images", 4)
    train.main(words(SMOKE, tmp_path, *network, *images, "--train.steps", "1", "--data.patch", "16"))
    target = tmp_path / "network.pth"
    export.main(["--run", str(tmp_path / "run"), "--out", str(target)])
    content = torch.load(target, weights_only=True)
    assert list(content) == ["params"]
    assert not [name for name in content["params"] if "auxiliary" in name]
    stock = small_network(kind, 4, **options)
    stock.load_state_dict(content["params"], strict=True)
    low = torch.rand(1, 3, 24, 32)
    found = ModelLoader("cpu").load_from_file(target)
    assert (found.scale, found.architecture.id) == (4, name)
    with torch.no_grad():
        assert torch.allclose(found.model.eval()(low), stock.eval()(low), atol=1e-5)


@pytest.mark.slow
def test_evaluation_writes_pictures_and_takes_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(words(SMOKE, tmp_path, "--train.device", "cpu"))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["metric"]) == ("super_resolution", "psnr")
    assert summary["bicubic_psnr"] > 25

    def evaluated(*overrides: str) -> dict[str, Any]:
        evaluate.main(["--run", str(run), *overrides])
        name = evaluate.test_set(overrides)
        return json.loads((run / f"evaluation{name and f'.{name}'}.json").read_text())

    own = evaluated()
    assert own["psnr"] == summary["value"]
    written = ["chelsea.png", "chelsea_strip.png", "truths.json"]
    assert sorted(path.name for path in (run / "evaluation/step_3").iterdir()) == written
    assert Image.open(run / "evaluation/step_3/chelsea.png").size == (450, 300), "an odd column is cut off"
    whole = evaluated("--data.tile", "0")
    assert whole["psnr"] == pytest.approx(own["psnr"], abs=1e-3), "tiles overlap as far as this network sees"
    half = evaluated("--local.precision", "bf16", "--data.pictures", "2", "--data.beside", str(run))
    assert half["psnr"] != own["psnr"]
    assert half["psnr"] == pytest.approx(own["psnr"], abs=0.1)
    strip = Image.open(run / "evaluation/step_3/chelsea_strip.png")
    assert strip.size[0] == 5 * 240
    assert half["overrides"][:2] == ["--local.precision", "bf16"]
    images = write_images(tmp_path / "mine", {"other.png": (64, 64)})
    with pytest.raises(ValueError, match="data.beside: .*step_3 has no picture of the images tested here"):
        evaluated("--data.name", "files", "--data.test", str(images), "--data.beside", str(run))
    # Another test set has a folder and figures of its own, even if its images have the same names.
    kept = {path.name: path.read_bytes() for path in (run / "evaluation/step_3").iterdir()}
    images = write_images(tmp_path / "others", {"chelsea.png": (300, 450)})
    elsewhere = ["--data.name", "files", "--data.test", str(images)]
    with pytest.raises(ValueError, match="data.beside: .*step_3 has no picture of the images tested here"):
        evaluated(*elsewhere, "--data.beside", str(run))
    assert evaluated(*elsewhere)["bicubic_psnr"] != own["bicubic_psnr"]
    assert {path.name: path.read_bytes() for path in (run / "evaluation/step_3").iterdir()} == kept
    assert evaluated()["psnr"] == own["psnr"]
    evaluated(*elsewhere, "--data.beside", str(run))
    (folder,) = [path for path in (run / "evaluation").iterdir() if path.name != "step_3"]
    assert Image.open(folder / "step_3/chelsea_strip.png").size[0] == 5 * 240
    assert "psnr" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [(), ("--local.recompute", "units"), ("--local.schedule", "end_to_end")])
@pytest.mark.parametrize("parts", ["1", "2"])
def test_an_estimate_reads_no_data_and_is_the_measurement_to_the_byte(overrides: tuple[str, ...], parts: str) -> None:
    config, task = small_task("--train.device", "cpu", "--model.tail_parts", parts, *overrides)
    predicted = estimate_step(build_blocks(task.build_chain(), config, task), config, shapes_of(task.example))
    assert task._patches is None
    assert task._test is None, "nothing was opened"
    blocks = build_blocks(task.build_chain(), config, task)
    prepare(blocks, config, torch.device("cpu"))
    measured = count_bytes(blocks, config, task.example())
    assert predicted.footprint.by_block_bytes == pytest.approx(measured.by_block_bytes, rel=0.01)


def peak(*overrides: str) -> int:
    """Bytes of EDSR-baseline, scale 4, 16 patches of 48 x 48, on fake tensors."""
    config, task = load(["--config", "tasks/super_resolution/configs/div2k_edsr_x4_k4_glcan.yaml", *overrides])
    blocks = build_blocks(task.build_chain(initial=False), config, task)
    return estimate_step(blocks, config, shapes_of(task.example)).footprint.peak_bytes


@pytest.mark.slow
def test_memory_of_edsr_baseline_in_four_blocks() -> None:
    plain = ("--model.tail_parts", "1")
    whole = peak("--local.schedule", "end_to_end", *plain)
    assert peak() < 0.40 * whole
    recomputed = peak("--local.schedule", "end_to_end", "--local.recompute", "units", *plain)
    in_parts = peak("--local.schedule", "end_to_end", "--local.recompute", "units")
    local = peak("--local.recompute", "units")
    assert local < recomputed
    assert local < in_parts, "even where end-to-end training has its tail in parts too"


@pytest.mark.slow
def test_a_plan_finds_a_cut_for_a_budget(tmp_path: Path) -> None:
    file, written = tmp_path / "plan.json", tmp_path / "plan.yaml"
    options = json.dumps({"num_feat": 32, "num_block": 6})
    budget = words(SMOKE, tmp_path, *few(tmp_path / "images"), "--model.options", options)
    plan.main([*budget, "--memory", "6MiB", "--json", str(file), "--out", str(written)])
    chosen = json.loads(file.read_text())
    assert chosen["peak_bytes"] <= chosen["budget_bytes"] == 6 * 2**20
    train.main(["--config", str(written), "--output.root", str(tmp_path), "--train.steps", "1"])


def test_parts_of_a_batch_are_the_whole_in_its_order() -> None:
    _, task = small_task("--train.accumulate", "2", "--data.repeat", "3")
    assert (task.steps_per_epoch(), task.smallest_batch()) == (3, 1)
    ways = [task.batches(0, 0, part) for part in (Part(0, 1), Part(0, 2), Part(1, 2))]
    for whole, *parts in zip(*ways, strict=False):
        for number, one in enumerate(whole):
            pieces = [part[number] for part in parts]
            assert torch.cat([piece.x for piece in pieces]).equal(one.x)
            assert torch.cat([piece.targets for piece in pieces]).equal(one.targets)
        break  # the last micro-batch is of one patch, which two replicas cannot share


def test_every_block_learns_and_nobody_elses_weights_change() -> None:
    config, task = small_task()
    blocks = build_blocks(task.build_chain(), config, task)
    prepare(blocks, config, torch.device("cpu"))
    held = [id(p) for block in blocks for p in block.parameters()]
    units = {id(p) for p in blocks[0].chain.model.parameters()}
    auxiliary = {id(p) for block in blocks if block.auxiliary for p in block.auxiliary.parameters()}
    assert sorted(held) == sorted(units | auxiliary), "registered, so they learn"
    before = [p.detach().clone() for block in blocks for p in block.parameters()]
    _, reports = SCHEDULES["sequential"](blocks).step(next(task.batches(0, 0))[0])
    assert all(report.loss.isfinite() for report in reports)
    after = [p for block in blocks for p in block.parameters()]
    assert all(not one.equal(other) for one, other in zip(before, after, strict=True))


@pytest.mark.slow
def test_training_beats_bicubic_on_real_photographs(tmp_path: Path) -> None:
    """Of a small network for half a minute, enough to see that all is wired right."""
    network = ("--model.options", json.dumps({"num_feat": 24, "num_block": 6}), "--data.batch", "8")
    train.main(
        words(SMOKE, tmp_path, *network, "--train.steps", "0", "--data.repeat", "1600", "--optimizer.lr", "0.002")
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["value"] > summary["bicubic_psnr"] + 0.3
