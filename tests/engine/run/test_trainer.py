import json
import math
import os
import re
import signal
import time
import types
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.network.message import Message
from engine.run.log import RunLog
from engine.run.trainer import Trainer
from engine.utilities.device import choose_device
from tests.toy import Toy, config


def trainer(room: Path, task: Toy | None = None, **changes: object) -> Trainer:
    settings = config(local__blocks=2, train__epochs=2, **changes)
    settings.output.root, settings.output.name = str(room), "run"
    return Trainer(settings, task or Toy())


def poison(task: Toy, call: int) -> None:
    """Make the loss not a number the ``call``-th time it is computed."""
    original, calls = task.loss, count(1)
    task.loss = lambda prediction, targets: original(prediction, targets) * (math.nan if next(calls) == call else 1)


def test_a_run_writes_what_the_design_says(tmp_path: Path) -> None:
    summary = trainer(tmp_path, train__log_every=1).fit()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard"}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    wanted = {"task", "schedule", "blocks", "auxiliary", "world_size", "steps", "metric", "value", "seconds"}
    assert wanted | {"peak_memory_bytes"} <= set(summary)
    assert (summary["blocks"], summary["auxiliary"], summary["steps"]) == (2, "greedy", 8)
    assert summary["metric"] == "error"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 9))
    assert all(len(line["train_loss"]) == 2 for line in losses), "one loss a block"
    assert [line["epoch"] for line in lines if "error" in line] == [1, 2]


def test_speed_and_memory_are_in_the_metrics_and_in_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 1 s, and saving and evaluating take 100 s, which do not count."""
    made, now = trainer(tmp_path, train__log_every=3), [0.0]
    monkeypatch.setattr("engine.run.log.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for name, seconds in (("_set_rate", 1.0), ("save", 100.0), ("_score", 100.0)):
        real = getattr(made, name)

        def slow(*given: Any, real: Any = real, seconds: float = seconds) -> Any:
            now[0] += seconds
            return real(*given)

        monkeypatch.setattr(made, name, slow)
    made.fit()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train_loss" in line]
    assert [(line["step"], line["samples_per_second"]) for line in logged] == [(3, 8.0), (4, 2.0), (6, 8.0), (8, 5.0)]
    assert all(line["peak_memory_bytes"] > 2**20 for line in logged)
    said = [line for line in capsys.readouterr().out.splitlines() if "samples/s" in line]
    for line, of_step, left in zip(said, logged, (5, 4, 2, 0), strict=True):
        place = f"epoch {1 + of_step['step'] // 5}/2, step {of_step['step']}/8"
        middle = f"loss {of_step['train_loss'][-1]:.4f}, lr {of_step['lr']:.3g}"
        wanted = f"{place}: {middle}, {of_step['samples_per_second']} samples/s, "
        assert line.startswith(wanted), line
        assert re.fullmatch(rf"[\d.]+ [MG]iB, ETA 0:00:0{left}", line.removeprefix(wanted)), line


def test_a_metric_that_is_not_computed_ends_the_run_at_the_first_evaluation(tmp_path: Path) -> None:
    task = Toy()
    task.metric = "mse"
    with pytest.raises(ValueError, match="`Toy.metric` is 'mse', but metrics\\(\\) gives error; set `metric` to one"):
        trainer(tmp_path, task).fit()
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1, "after one epoch"


def test_a_start_that_fails_leaves_no_folder_and_so_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Toy, *args: object) -> None:
        raise ValueError("data.root: cannot be read")

    whole = Toy.batches
    monkeypatch.setattr(Toy, "batches", broken)
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="data.root"):
        made.fit()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Toy, "batches", whole)
    trainer(tmp_path, train__steps=1).fit()
    monkeypatch.setattr(Toy, "batches", broken)
    made = trainer(tmp_path, train__resume="auto")
    with pytest.raises(ValueError, match="data.root"):
        made.fit()
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "a folder of an earlier start stays"
    assert (tmp_path / "run/checkpoints/step_1").is_dir()


def test_samples_per_second_count_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, counted = trainer(tmp_path, train__log_every=1), []
    monkeypatch.setattr(made._pace, "step", counted.append)
    made.fit()
    assert counted == [8, 8, 8, 2] * 2


def test_end_to_end_has_one_block_and_no_auxiliary_network(tmp_path: Path) -> None:
    summary = trainer(tmp_path, local__schedule="end_to_end").fit()
    assert (summary["schedule"], summary["blocks"], summary["auxiliary"]) == ("end_to_end", 1, None)


def test_the_last_short_batch_is_trained_on(tmp_path: Path) -> None:
    seen = []
    task = Toy()
    original = task.loss
    task.loss = lambda prediction, targets: (seen.append(len(targets)), original(prediction, targets))[1]
    trainer(tmp_path, task, train__steps=4).fit()
    assert seen == [8, 8, 8, 8, 8, 8, 2, 2, 26], "two blocks each; evaluation last"


def test_a_second_run_of_the_same_name_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    for expected in ("run", "run-2", "run-3"):
        made = trainer(tmp_path, train__steps=1)
        assert made.folder.name == expected
        made.fit()


def test_auto_goes_on_with_the_last_run_of_the_name(tmp_path: Path) -> None:
    """It took the first one's folder, so an interrupted second run was never gone on with."""
    for steps in (8, 3):
        trainer(tmp_path, train__steps=steps).fit()
    again = trainer(tmp_path, train__resume="auto")
    assert (again.folder.name, again.position.step) == ("run-2", 3)


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    task = Toy()
    made = trainer(tmp_path, task, train__save_every=1, train__log_every=100)
    poison(task, call=6)
    with pytest.raises(ValueError, match=r"block 1: loss is nan at step 3; lower optimizer.lr .*step_2"):
        made.fit()
    assert sorted(path.name for path in (made.folder / "checkpoints").iterdir()) == ["step_1", "step_2"]


def test_a_loss_that_is_not_a_number_in_any_micro_batch_counts(tmp_path: Path) -> None:
    """Only the last micro-batch's loss was looked at, and poisoned weights were saved as good ones."""
    task = Toy()
    batches = task.batches
    task.batches = lambda epoch, start, part: (
        [Message({"x": part}, y) for part, y in zip(b[0].x.split(4), b[0].targets.split(4), strict=True)]
        for b in batches(epoch, start, part)
    )
    poison(task, call=5)
    made = trainer(tmp_path, task, train__save_every=1)
    with pytest.raises(ValueError, match=r"block 0: loss is nan at step 2; .*step_1"):
        made.fit()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path, train__steps=1)
    made.fit()
    with torch.no_grad():
        made.chain.model.output.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"block 1: 'output.weight' is not finite at step 1; .*checkpoint: .*step_1"):
        made.save()


def test_evaluation_leaves_frozen_normalisations_frozen(tmp_path: Path) -> None:
    made = trainer(tmp_path, Toy(norm=True))
    made.chain.model.layers[1].norm.eval()
    made.fit()
    assert [layer.norm.training for layer in made.chain.model.layers] == [True, False, True, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_the_run_goes_on_from_there(tmp_path: Path, number: int) -> None:
    task = Toy()
    made = trainer(tmp_path, task)
    original, calls = task.loss, 0

    def loss(prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), number)
        return original(prediction, targets)

    task.loss = loss
    before = signal.getsignal(number)
    summary = made.fit()
    assert signal.getsignal(number) is before
    assert summary["interrupted"]
    assert summary["steps"] == 3, "the step is finished first"
    again = trainer(tmp_path, train__resume="auto")
    assert again.position.step == 3
    assert again.fit()["steps"] == 8


def test_batchnorm_with_a_batch_of_one_is_refused_before_training(tmp_path: Path) -> None:
    task = Toy(norm=True, samples=25)
    with pytest.raises(
        ValueError, match=r"smallest micro-batch has 1 sample and BatchNorm 'layers.0.norm' needs at least 2"
    ):
        trainer(tmp_path, task)
    assert not (tmp_path / "run").exists()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="cuda asked for, but torch .* sees no GPU"):
        choose_device("cuda")
    for name in ("gpu", "meta", "cpu:3"):
        with pytest.raises(ValueError, match=f"'{name}' is none of"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="cuda:2 asked for, but there are 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_checkpointing_changes_no_bit_on_a_gpu(tmp_path: Path) -> None:
    from tests.toy import assert_equal, state

    states = []
    for recompute in ("none", "units"):
        made = trainer(tmp_path / recompute, Toy(dropout=0.5), local__recompute=recompute)
        made.fit()
        states.append(state(made.blocks))
    assert_equal(*states)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_repeats_itself_to_the_bit(tmp_path: Path, precision: str) -> None:
    from tests.toy import assert_equal, state

    states = []
    for number in range(2):
        made = trainer(tmp_path / str(number), Toy(norm=True, dropout=0.2), local__precision=precision)
        assert made.device.type == "cuda"
        made.fit()
        states.append(state(made.blocks))
    assert_equal(*states)


def test_metrics_of_a_run_without_a_usable_checkpoint_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "error": 1.0}\n')
    RunLog(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert json.loads((tmp_path / "metrics-1.jsonl").read_text()) == {"step": 7, "error": 1.0}


def test_of_two_jobs_that_chose_one_folder_each_gets_its_own(tmp_path: Path) -> None:
    """Both wrote into the first: configs were overwritten and figures mixed."""
    made = []
    for _ in range(3):
        settings = config(train__epochs=1, local__blocks=2)
        settings.output.root, settings.output.name = str(tmp_path), "run"
        made.append(Trainer(settings, Toy()))
    assert {trainer.folder for trainer in made} == {tmp_path / "run"}
    assert not (tmp_path / "run").exists(), "made when training starts, so that a refused run leaves none"
    for trainer in made:
        trainer.fit()
    assert [trainer.folder.name for trainer in made] == ["run", "run-2", "run-3"]
    assert all((trainer.folder / "summary.json").is_file() for trainer in made)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = config(train__epochs=1, local__blocks=2)
    settings.output.root, settings.output.name = str(tmp_path / "file"), "run"
    with pytest.raises(ValueError, match=r"^output.root: \S+/file/run cannot be made: File exists: \S+/file$"):
        Trainer(settings, Toy()).fit()


def test_seconds_of_an_epoch_count_its_first_step(tmp_path: Path) -> None:
    settings = config(train__epochs=2, train__log_every=1, train__accumulate=2, local__blocks=2)
    settings.output.root, settings.output.name = str(tmp_path), "run"
    made = Trainer(settings, Toy())
    real = made.blocks[0].local_step

    def slow(message: Message, **options: Any) -> Any:
        if made.position.step_in_epoch == 0:
            time.sleep(0.1)
        return real(message, **options)

    made.blocks[0].local_step = slow  # type: ignore[method-assign]
    made.fit()
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    first = [line["seconds"] for line in lines if "train_loss" in line and line["step"] % made.steps_per_epoch == 1]
    assert len(first) == 2
    assert all(seconds >= 0.1 for seconds in first)
