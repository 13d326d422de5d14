"""The benchmarks of links and of more ranks than cores run from the command line, and their figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency, simulated
from benchmarks.rivals.rival import Entry
from benchmarks.simulated import _one_f_one_b

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--config", str(ROOT / "tasks/classification/configs/smoke.yaml"), "--data.batch", "8", "--local.blocks", "2"]
WORDS += ["--train.device", "cpu", "--local.cut", "[]", "--steps", "2"]


@pytest.mark.slow
def test_latency(tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    latency.main([*WORDS, "--delays", "0", "100", "--micro-batches", "2", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["variant"].split(",")[0], row["delay_seconds"]) for row in rows] == [
        ("local pipeline", 0),
        ("local pipeline", 0.1),
        ("torch 1F1B", 0),
        ("torch 1F1B", 0.1),
    ]
    assert rows[3]["step_seconds"] > rows[2]["step_seconds"] + 0.1, "there and back, at least once a step"


@pytest.mark.slow
def test_simulated(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    page = tmp_path / "s.html"
    simulated.main([*WORDS, "--ranks", "2", "--micro-batches", "2", "--json", str(file), "--html", str(page)])
    rows = json.loads(file.read_text())["rows"]
    assert {(row["variant"], row["micro_batches"]) for row in rows} == {
        ("local pipeline", 1),
        ("local pipeline", 2),
        ("local pipeline", 4),
        ("torch 1F1B", 2),
    }
    for row in rows:
        longest = max(row["computing_seconds_per_rank"])
        if row["variant"] == "local pipeline":
            assert row["simulated_seconds"] == pytest.approx(longest)
        else:
            assert row["simulated_seconds"] > longest
    assert "Pipelines on as many cores" in page.read_text()


def test_a_rivals_time_is_divided_over_its_actions() -> None:
    entry = Entry("1F1B", "", ranks=2, micro_batches=4)
    run = _one_f_one_b(entry, [6.0, 6.0], [1 / 3, 1 / 3])
    assert run.step_seconds == pytest.approx(6.0 * 5 / 4), "(m + p - 1) / m"
    assert run.bubble == pytest.approx(1 / 5)
