"""Options of auxiliary networks: of any annotated type, found by name, refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

from engine.learning.auxiliary import AuxiliaryNetwork, build_auxiliary, known_families
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from tests.toy import Toy


class WithOptions(AuxiliaryNetwork):
    """Keeps its options. They stand before and after what the engine gives: options go by name, not by place."""

    def __init__(self, head: nn.Module, **options: Any) -> None:
        super().__init__()
        self.head, self.options = head, options

    @classmethod
    def build(  # type: ignore[override]
        cls,
        chain: Chain,
        span: Span,
        *,
        kind: Literal["plain", "wide"] = "plain",
        bank: FeatureBank,
        task: Task,
        deep: bool = False,
        sizes: list[int] | None = None,
        rate: float = 0.5,
        name: str = "",
    ) -> WithOptions:
        head = task.auxiliary_head(chain, chain.shapes()[span.stop - 1], FeatureBank())
        return cls(head, kind=kind, deep=deep, sizes=sizes, rate=rate, name=name)

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(message, FeatureBank())


class Untyped(WithOptions):
    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task, depth=2) -> Untyped:  # type: ignore[no-untyped-def,override]
        return cls(nn.Identity())


class Required(WithOptions):
    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task, *, depth: int) -> Required:  # type: ignore[override]
        return cls(nn.Identity(), depth=depth)


class OwnToy(Toy):
    own_auxiliaries = {"options": WithOptions, "untyped": Untyped, "required": Required}


def built(**options: Any) -> Any:
    task = OwnToy()
    chain = task.build_chain()
    return build_auxiliary(options or "options", chain, Span(0, 2, 0, 2), FeatureBank(), task, 0)


def test_options_of_every_annotated_kind_arrive() -> None:
    found = built(type="options", kind="wide", deep=True, sizes=[1, 2], rate=1, name="x")
    assert found.options == {"kind": "wide", "deep": True, "sizes": [1, 2], "rate": 1.0, "name": "x"}
    assert isinstance(found.options["rate"], float)
    assert built().options == {"kind": "plain", "deep": False, "sizes": None, "rate": 0.5, "name": ""}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"type": "options", "kind": "wyde"},
            r"kind of options: 'wyde' is none of plain, wide; did you mean 'wide'",
        ),
        ({"type": "options", "deep": "perhaps"}, "deep of options: 'perhaps' is not true or false"),
        (
            {"type": "options", "sizes": [1, "two"]},
            r"sizes of options: \[1, 'two'\] is not a list of whole numbers or",
        ),
        ({"type": "options", "dep": True}, "options has no option 'dep', did you mean 'deep'?"),
        ({"type": "untyped", "depth": 1}, r"option 'depth' of untyped has no type; annotate it in Untyped.build"),
        ({"type": "untyped"}, r"option 'depth' of untyped has no type"),
        ({"type": "required"}, "required needs its option 'depth'; give --local.auxiliary.depth"),
        ({"type": "required", "depth": None}, "depth of required: None is not a whole number"),
        ({"type": "required", "depth": True}, "depth of required: True is not a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        built(**options)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("local.auxiliary: ")


def test_a_tasks_own_networks_are_its_alone() -> None:
    assert "options" in known_families(OwnToy())
    assert "options" not in known_families(Toy())


def test_a_class_of_ones_own_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from engine.learning.auxiliary.greedy import Greedy\n\n\nclass Mine(Greedy):\n    pass\n\n\nNUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert type(built(type="my_networks:Mine")).__name__ == "Mine"
    said = "'my_networks:NUMBER' is not a subclass of engine.learning.auxiliary.AuxiliaryNetwork"
    with pytest.raises(ValueError, match=said):
        built(type="my_networks:NUMBER")
    with pytest.raises(ValueError, match="local.auxiliary: cannot import 'my_networks:Yours'"):
        built(type="my_networks:Yours")
    with pytest.raises(ValueError, match="no 'Mien'; did you mean 'my_networks:Mine'\\?$"):
        built(type="my_networks:Mien")


FAILING = """from engine.learning.auxiliary.greedy import Greedy


class Building(Greedy):
    @classmethod
    def build(cls, chain, span, bank, task):
        return {}["width"]


class Running(Greedy):
    def forward(self, message, bank):
        return message.features["skip"]
"""


@pytest.mark.parametrize(("name", "said"), [("Building", "'width'.*line 7"), ("Running", "'skip'.*line 12")])
def test_a_class_of_ones_own_that_fails_is_named(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed ended in a traceback, or did so only in the first step."""
    (tmp_path / "my_failing.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    start = rf"^local.auxiliary: 'my_failing:{name}' fails on block 0's output of shape \(2, 6\): KeyError: "
    with pytest.raises(ValueError, match=rf"{start}{said}\)$"):
        built(type=f"my_failing:{name}")
