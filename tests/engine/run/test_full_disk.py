"""A disk that is full ends a run with one line, and what was saved before stays good."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.distributed.order import Order
from engine.run.checkpoint import find_checkpoint
from engine.run.log import RunLog
from engine.run.trainer import Trainer
from engine.utilities.files import WriteError
from tests.disk import full_disk
from tests.toy import Toy, config


def trainer(room: Path, **changes: object) -> Trainer:
    settings = config(local__blocks=2, train__epochs=2, train__log_every=1, train__save_every=2, **changes)
    settings.output.root, settings.output.name = str(room), "run"
    return Trainer(settings, Toy())


MOMENTS = [
    ("_begin", 0, "run/config.yaml", "none"),
    ("train", 2, "run/metrics.jsonl", "step_2"),
    ("save", 4, "run/checkpoints/step_4", "step_2"),
    ("score", 4, "run/metrics.jsonl", "step_4"),
    ("_finish", 8, "run/summary.json", "step_8"),
]


@pytest.mark.parametrize(("moment", "step", "file", "kept"), MOMENTS, ids=[moment for moment, *_ in MOMENTS])
def test_a_full_disk_names_the_file_and_the_last_good_checkpoint(
    moment: str, step: int, file: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path)
    fill(made, moment, step)
    kept = kept if kept == "none" else f"{tmp_path}/run/checkpoints/{kept}"
    said = f"{tmp_path}/{file}: cannot be written: File too large; make room or choose another output.root; "
    with pytest.raises(WriteError, match=f"^{re.escape(said)}last good checkpoint: {kept}$"):
        made.fit()
    files = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in files if name.startswith(".")], "nothing half-written"
    lines = (tmp_path / "run/metrics.jsonl").read_text() if moment != "_begin" else ""
    assert all(json.loads(line) for line in lines.splitlines())
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (moment != "_begin"), "an empty folder would take the name of the next run"
    again = trainer(tmp_path, train__resume="auto")
    assert str(find_checkpoint(again.folder / "checkpoints", print) or "none") == kept
    assert again.fit()["steps"] == 8


def fill(made: Trainer, moment: str, step: int) -> None:
    """Let the disk be full while an order is followed, or while a method of the trainer runs."""
    real = getattr(made, moment if moment.startswith("_") else "_follow")

    def called(*arguments: Any) -> Any:
        order = arguments[0] if arguments else None
        if isinstance(order, Order) and (order.kind, made.position.step) != (moment, step):
            return real(*arguments)
        made.writer.wait()
        with full_disk():
            result = real(*arguments)
            made.writer.wait()
        return result

    setattr(made, real.__name__, called)


def test_curves_that_find_the_disk_full_say_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = threading.excepthook
    assert hook.__module__ != "engine.run.log", "it was replaced for good when the module was imported"
    log = RunLog(tmp_path, 0)
    with (
        full_disk(2000),
        pytest.raises(WriteError, match=f"^{tmp_path}/tensorboard: cannot be written: "),
    ):
        write_many(log)
    with suppress(WriteError):
        log.close()
    log.close()
    assert threading.excepthook is hook
    assert "Traceback" not in capsys.readouterr().err


def write_many(log: RunLog) -> None:
    for step in range(1000):
        log.write(step, {"loss": 0.5})
        time.sleep(0.001)  # TensorBoard writes on a thread of its own
