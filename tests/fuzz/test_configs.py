"""Mistakes in configs and on the command line: each is refused in one line, or trains."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tasks.classification.config import ClassificationConfig
from tests.fuzz.mistakes import fuzz, put, train
from tests.tools.commands import SMOKE

BASE: dict[str, Any] = yaml.safe_load(Path(SMOKE[1]).read_text())


def paths(cls: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a config class, as the path to it."""
    found = []
    for each in dataclasses.fields(cls):
        inner = each.default_factory if dataclasses.is_dataclass(each.default_factory) else None
        found += paths(inner, (*prefix, each.name)) if inner else [(*prefix, each.name)]
    return found


WRONG: list[Any] = [
    *(None, True, -1, 0, 1, 7, 0.5, -0.5, 1e308, float("inf"), float("nan"), 2**63),
    *(
        "",
        " ",
        "x",
        "none",
        "auto",
        "1GiB",
        "-1",
        "1e3",
        "résumé",
        "nul\0",
        "../..",
        "/",
        "a/b",
        "~",
        "$HOME",
        "{",
        "[1",
    ),
    *([], [-1], [0, 0, 1, 1], [None], ["stage1.0"], ["x", "x"], [[1]], {}, {"type": "glcan"}, {"type": 3}, {"a": 1}),
    *({"type": "glcan", "width": 0}, {"type": "glcan", "reduce": "2"}, {"type": "greedy", "depth": 1}),
]
# A user who asks for more processes or memory than there are gets what the system says.
HARMFUL = {("data", "workers"), ("train", "epochs"), ("data", "size")}


@fuzz(
    path=st.sampled_from(paths(ClassificationConfig)),
    value=st.sampled_from(WRONG) | st.text(max_size=8) | st.integers(-3, 40) | st.floats(-2, 2),
    at=st.sampled_from(["file", "command line"]),
)
def test_a_wrong_value(rooms: Any, path: tuple[str, ...], value: Any, at: str) -> None:
    if path in HARMFUL and isinstance(value, int) and value > 100:
        return
    room, config = rooms(), json.loads(json.dumps(BASE))
    words = ["--config", "config.yaml"]
    if at == "file":
        put(config, path, value)
    else:
        said = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        if "\0" in said:  # no system passes one on
            return
        words += ["--" + ".".join(path), said]
    (room / "config.yaml").write_text(yaml.safe_dump(config))
    train(room, *words, *([] if path[0] == "output" else ["--output.root", "runs"]), named=[".".join(path)])


KEYS = [(key,) for key in BASE] + [(key, inner) for key in BASE if isinstance(BASE[key], dict) for inner in BASE[key]]


@st.composite
def misspelt(draw: Any) -> tuple[tuple[str, ...], str]:
    """A key that the file has, and another word in its place."""
    path = draw(st.sampled_from(KEYS))
    word = path[-1]
    at, letter = draw(st.integers(0, len(word) - 1)), draw(st.sampled_from(string.ascii_lowercase + "_-. "))
    forms = [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word.upper(), f"{word}s", ""]
    return path, draw(st.sampled_from([form for form in forms if form != word]))


@fuzz(mistake=misspelt())
def test_a_misspelt_key(rooms: Any, mistake: tuple[tuple[str, ...], str]) -> None:
    room, config = rooms(), json.loads(json.dumps(BASE))
    path, word = mistake
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[word] = inner.pop(path[-1])
    (room / "config.yaml").write_text(yaml.safe_dump(config))
    named = [repr(".".join((*path[:-1], word))), *(["task: no value given"] if path == ("task",) else [])]
    done = train(room, "--config", "config.yaml", named=named)
    assert done.returncode == 2, (path, word)
    assert not (room / "runs").exists(), "nothing begins"


@fuzz(
    at=st.floats(0, 1),
    cut=st.integers(0, 12),
    put_in=st.text(max_size=4)
    | st.sampled_from(["\t", "\n\n  ", ": ", "- ", "{", "'", '"', "#", "&a ", "*a", "!!int ", "\ufeff"]),
)
def test_a_damaged_config_file(rooms: Any, at: float, cut: int, put_in: str) -> None:
    room, text = rooms(), Path(SMOKE[1]).read_text()
    start = int(at * len(text))
    (room / "config.yaml").write_bytes((text[:start] + put_in + text[start + cut :]).encode("utf-8", "surrogateescape"))
    words = ["--config", "config.yaml", "--output.root", "runs", "--train.steps", "2", "--data.subset", "100"]
    train(room, *words, named=["config.yaml", *map(".".join, KEYS)])


@fuzz(
    content=st.binary(max_size=64) | st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"a: &a [*a, *a]", b"? - 1\n: 2"])
)
def test_a_config_of_arbitrary_bytes(rooms: Any, content: bytes) -> None:
    room = rooms()
    (room / "config.yaml").write_bytes(content)
    assert train(room, "--config", "config.yaml", named=["config.yaml"]).returncode == 2
