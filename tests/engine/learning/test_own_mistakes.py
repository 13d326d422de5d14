"""Mistakes in networks of users' own: each is one line that names the unit, before training starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.utilities.command import run_tool
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification
from tools.train import main

NETWORK = '''
import torch
from dataclasses import replace
from torch import nn
from engine.network.chain import Chain, Unit
from engine.network.message import Message


class Many(nn.Conv2d):
    """Returns ``kind(x)`` in place of x."""

    kind = None

    def forward(self, x):
        return self.kind(super().forward(x))


def pooled(module, message):
    return message.with_x(module(message.x.mean((2, 3))))


def chain(first=None, order=(0, 1), forward=None, width=16, out=None, lazy=False, channels=3, **features):
    def make(classes, size):
        model = nn.Sequential(
            first or nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 16, 3),
            nn.LazyLinear(7) if lazy else nn.Linear(width, out or classes),
        )
        units = [Unit(f"layer{n}", model[n], **({"forward": forward} if forward and n == 1 else {})) for n in order]
        example = Message({"x": torch.zeros(2, channels, size, size), **features})
        return Chain(model, units, Unit("head", model[2], pooled), example)

    return make


def many(kind):
    made = Many(3, 8, 3)
    made.kind = kind
    return made


def masked(module, message):
    return message.with_x(module(message.x) * message.features["mask"].mean())


class Sized(nn.Conv2d):
    def forward(self, x):
        return super().forward(self.checked(x))

    def checked(self, x):
        raise KeyError("size")  # HERE


right = chain()
grey = chain(nn.Conv2d(1, 8, 3), channels=1)
of_two = chain(many(lambda x: x[: len(x) // 2].repeat(2, 1, 1, 1)))
a_tuple = chain(many(lambda x: (x, x)))
a_dict = chain(many(lambda x: {"x": x}))
nothing = chain(many(lambda x: None))
no_message = chain(forward=lambda module, message: module(message.x))
no_return = chain(forward=lambda module, message: None)
without_x = chain(forward=lambda module, message: replace(message, features={"y": module(message.x)}))
turned_round = chain(order=(1, 0))
wrong_head = chain(width=32)
few_classes = chain(out=7)
more_classes = chain(out=1000)
failing = chain(Sized(3, 8, 3))
absent = chain(forward=masked)
only_in_the_example = chain(forward=masked, mask=torch.ones(2))
lazy = chain(lazy=True)
no_function = 3


def raising(classes, size):
    raise KeyError("no such backbone")


def too_few(classes):
    return None


def stray(classes, size):
    made = chain()(classes, size)
    return Chain(made.model, made.units[1:], made.head, made.example)
'''


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Runs ``tools/train.py`` with a network of the module above; gives exit code and stderr."""
    config = Path("tasks/classification/configs/smoke.yaml").resolve()
    (tmp_path / "own_mistakes.py").write_text(NETWORK)
    (tmp_path / "own_broken.py").write_text("raise OSError('no disk')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_mistakes", raising=False)

    def run(name: str) -> tuple[int, str]:
        words = ["--config", str(config), "--model.name", name, "--local.blocks", "2", "--train.steps", "1"]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            run_tool(main)
        except SystemExit as ended:
            return int(ended.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_tuple", "unit 'layer0', given x (2, 3, 16, 16), returns tuple as x, not a tensor"),
        ("a_dict", "unit 'layer0', given x (2, 3, 16, 16), returns dict as x, not a tensor"),
        ("nothing", "unit 'layer0', given x (2, 3, 16, 16), returns NoneType as x, not a tensor"),
        ("no_message", "unit 'layer1', given x (2, 8, 14, 14), returns a tensor, not a Message"),
        ("no_return", "unit 'layer1', given x (2, 8, 14, 14), returns NoneType, not a Message"),
        ("without_x", "unit 'layer1', given x (2, 8, 14, 14), returns nothing as x, not a tensor"),
        ("turned_round", "unit 'layer1', given x (2, 3, 16, 16), fails: RuntimeError: "),
        ("wrong_head", "unit 'head', given x (2, 16, 12, 12), fails: RuntimeError: "),
        ("few_classes", "the head 'head' returns (2, 7) for 2 images, not (2, 10)"),
        (
            "grey",
            "unit 'layer0', given x (3, 3, 16, 16) when images are (3, 3, 16, 16) and not the example's "
            "(2, 1, 16, 16), fails: RuntimeError: ",
        ),
        ("of_two", "unit 'layer0' returns 2 samples for 3"),
        ("absent", "unit 'layer1', given x (2, 8, 14, 14), fails: KeyError: 'mask'"),
        ("only_in_the_example", "example has feature 'mask', which no batch of classification has (they have x)"),
        (
            "lazy",
            "'weight' of unit 'head' has no shape yet, because it is in a lazy module; run the model on an example",
        ),
        ("no_function", "TypeError: 'int' object is not callable"),
        ("raising", "model.name: 'own_mistakes:raising': KeyError: 'no such backbone' ("),
        ("too_few", "TypeError: too_few() takes 1 positional argument but 2 were given"),
        ("stray", "'0.weight' of the model is in no unit"),
        ("missing", "cannot import 'own_mistakes:missing'"),
    ],
)
def test_a_mistake_is_one_line_before_training(name: str, words: str, train: object, tmp_path: Path) -> None:
    code, said = train(f"own_mistakes:{name}")  # type: ignore[operator]
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert words in said
    assert not (tmp_path / "runs").exists()


def test_a_module_that_fails_is_one_line(train: object) -> None:
    code, said = train("own_broken:make")  # type: ignore[operator]
    assert code == 2
    assert "model.name: cannot import 'own_broken:make'" in said
    assert said.endswith("OSError: no disk\n")


def test_an_error_inside_a_unit_names_its_file_and_line(train: object, tmp_path: Path) -> None:
    code, said = train("own_mistakes:failing")  # type: ignore[operator]
    assert code == 2
    line = next(number for number, text in enumerate(NETWORK.splitlines(), 1) if "# HERE" in text)
    assert said.endswith(f"fails: KeyError: 'size' ({tmp_path / 'own_mistakes.py'}, line {line})\n"), said


def test_a_head_with_outputs_to_spare_trains_and_the_log_says_so(
    train: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network for 1000 classes, fine-tuned on ten of them, was refused."""
    assert train("own_mistakes:more_classes") == (0, "")  # type: ignore[operator]
    config = ClassificationConfig(task="classification")
    config.model.name, config.data.size = "own_mistakes:more_classes", 16
    for initial in (True, False):
        Classification(config).build_chain(initial)
    assert capsys.readouterr().out.count("the head has 1000 outputs for 10 classes") == 1


def test_without_a_mistake_it_trains(train: object, tmp_path: Path) -> None:
    assert train("own_mistakes:right")[0] == 0  # type: ignore[operator]
    assert len(list((tmp_path / "runs").iterdir())) == 1
