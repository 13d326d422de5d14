"""The commands as a user types them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.ranks import start_forked
from tests.tools.commands import ALONE, ROOT, SMOKE, assert_refused, call, run, typed
from tools import evaluate


def test_train_evaluate_export_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "tools/train.py"), *SMOKE, "--output.name", "r"]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "│ 0     │ stem" in done.stdout
    assert "accuracy 0." in done.stdout.splitlines()[-1]
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert (summary["task"], summary["steps"], summary["blocks"]) == ("classification", 3, 4)

    evaluated = call("--run", "runs/r", tool="evaluate", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((tmp_path / "runs/r/evaluation.json").read_text())
    assert found["accuracy"] == summary["value"]
    assert f"accuracy {summary['value']:.4f}" in evaluated.stdout

    refused = call("--run", "runs/r", "--out", "m.onnx", tool="export", cwd=tmp_path)
    assert_refused(refused, "--out: m.onnx does not end in .safetensors, nor for torch.load in .pth, .pt, .bin, .ckpt")
    assert not (tmp_path / "m.onnx").exists()
    exported = call("--run", "runs/r", "--out", "m.pth", tool="export", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    from tasks.classification.resnet import ResNet

    ResNet(8, 10).load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True), strict=True)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    words = [*SMOKE, "--output.name", "r", "--train.steps", "0", "--train.epochs", "40", "--train.log_every", "1"]
    command = [sys.executable, str(ROOT / "tools/train.py"), *words]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs/r/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert "stopped and saved at step" in out
    assert "Traceback" not in err
    stopped = json.loads((tmp_path / "runs/r/summary.json").read_text())["steps"]
    again = call(*words[:-2], "--train.resume", "auto", "--train.steps", str(stopped + 2), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"at step {stopped}" in again.stdout
    assert json.loads((tmp_path / "runs/r/summary.json").read_text())["steps"] == stopped + 2


BAD_INPUT = [
    (["--local.blcks", "3"], "unknown key 'local.blcks', did you mean 'local.blocks'?"),
    (["--local.blocks", "many"], "local.blocks: 'many' is not a whole number"),
    (["--local.blocks", "9"], "local.blocks: 9 blocks asked for, the network has 4 units; choose 1 to 4"),
    (
        ["--local.cut", "[layer7]"],
        "local.cut: 'layer7' is not a unit of this network; its units are stem, layer1.0",
    ),
    (
        ["--local.schedule", "piepline"],
        "streams, pipeline; did you mean 'pipeline'?",
    ),
    (["--local.recompute", "true"], "local.recompute: 'true' is none of none, units"),
    (["--local.auxiliary", "glcam"], "; did you mean 'glcan'?"),
    (
        ["--data.batch", "1"],
        "data.batch: the smallest micro-batch has 1 sample and BatchNorm 'bn1' needs at least 2",
    ),
    (["--data.name", "folder", "--data.root", "nowhere"], "data.root: nowhere has no folder train/"),
    (["--model.classes", "5"], "model.classes: label 9 ('9') is out of range for 5 classes"),
    (["--model.name", "resnet19"], "model.name: resnet19 does not exist"),
    (["--train.device", "gpu"], "train.device: 'gpu' is none of auto, cpu, cuda, cuda:N"),
    (["--train.resume", "nowhere"], "train.resume: nowhere is not a checkpoint"),
    (["--optimizer.lr", "1e30"], "loss is"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    assert_refused(call(*SMOKE, *words, cwd=tmp_path), message)


@pytest.mark.parametrize(("words", "message"), [BAD_INPUT[0], BAD_INPUT[-1]], ids=["a key", "while training"])
def test_bad_input_as_a_user_types_it(tmp_path: Path, words: list[str], message: str) -> None:
    assert_refused(run(*SMOKE, *words, cwd=tmp_path), message)


def test_bad_input_of_the_other_tools(tmp_path: Path) -> None:
    for tool, words in (("evaluate", []), ("export", ["--out", "x.pth"])):
        done = run("--run", "nowhere", *words, tool=tool, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.strip() == "error: --run: nowhere is no run: it has no config.yaml"
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    assert call(*SMOKE, "--output.name", "r", cwd=tmp_path).returncode == 0
    before = (tmp_path / "runs/r/summary.json").read_text()
    done = call(*SMOKE, "--output.name", "r", "--train.resume", "auto", "--model.name", "resnet14", cwd=tmp_path)
    assert done.returncode == 2
    assert "belongs to another model: 'layer1.1.conv1.weight' is nothing in it" in done.stderr
    assert (tmp_path / "runs/r/summary.json").read_text() == before


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16)).save(tmp_path / "set" / split / name / f"{number}.jpg")
    (tmp_path / "set/train/b/2.jpg").write_bytes(b"\xff\xd8 cut")
    words = ["--data.name", "folder", "--data.root", "set", "--data.batch", "4", "--data.subset", "0"]
    done = call(*SMOKE, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: data.root: cannot read image set/train/b/2.jpg")


def test_help_says_what_each_key_does(tmp_path: Path) -> None:
    done = call("--config", SMOKE[1], "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "more blocks need less memory and cost some accuracy" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """Killed three times, perhaps while saving, and resumed each time: the bits of the run nobody touched."""
    from safetensors.torch import load_file

    words = [*SMOKE, "--train.steps", "0", "--train.epochs", "3", "--train.save_every", "1", "--train.keep", "3"]
    assert call(*words, "--output.name", "whole", cwd=tmp_path).returncode == 0
    resuming = [*words, "--output.name", "r", "--train.resume", "auto"]
    folder = tmp_path / "runs/r/checkpoints"
    for target in (2, 7, 12):
        running = start_forked(typed, resuming, tmp_path)
        deadline = time.monotonic() + 120
        while running.is_alive() and time.monotonic() < deadline:
            if folder.is_dir() and any(path.name == f".step_{target}.writing" for path in folder.iterdir()):
                break
            if (folder / f"step_{target}").is_dir():
                break
            time.sleep(0.001)
        running.kill()
        running.join()
    done = call(*resuming, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    whole = tmp_path / "runs/whole/checkpoints"
    (last,) = {max(int(p.name.split("_")[1]) for p in f.glob("step_*")) for f in (whole, folder)}
    for path in (whole / f"step_{last}").glob("*.safetensors"):
        ours, theirs = load_file(folder / f"step_{last}" / path.name), load_file(path)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), path.name


@pytest.mark.slow
def test_evaluation_runs_in_the_precision_of_training(tmp_path: Path) -> None:
    assert call(*SMOKE, "--output.name", "r", "--local.precision", "bf16", cwd=tmp_path).returncode == 0
    assert call("--run", "runs/r", tool="evaluate", cwd=tmp_path).returncode == 0
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert json.loads((tmp_path / "runs/r/evaluation.json").read_text())["loss"] == summary["loss"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], ""),
        (["--local.precision", "bf16", "--data.batch=8"], ""),
        (["--data.name", "files", "--data.test=Set5/*_HR.png"], "files_Set5-_HR.png"),
        (["--data.root", "../elsewhere/"], "elsewhere"),
    ],
)
def test_an_evaluation_is_named_by_its_test_set(overrides: list[str], name: str) -> None:
    assert evaluate.test_set(overrides) == name


def test_long_names_of_test_sets_stay_apart() -> None:
    names = {evaluate.test_set(["--data.root", f"/{first}{'/folder' * 60}/Set5"]) for first in "ab"}
    assert len(names) == 2
    assert all(len(name) < 100 and "Set5-" in name for name in names)
