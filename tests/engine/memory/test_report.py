"""Reports: JSON with stable keys, tables, a page that needs nothing else."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine.memory import CATEGORIES
from engine.memory.charts import pareto_front, write_report
from engine.memory.measure import CudaMemory, Measured, Memory
from engine.memory.plan import make_plan
from engine.memory.report import (
    Row,
    block_sheet,
    header,
    make_row,
    notes,
    plan_notes,
    plan_sheet,
    sheets,
    write_json,
)
from engine.memory.variant import END_TO_END, OFFLOADED, Variant, estimate_variant
from engine.memory.work import Speed
from tasks import find_task, load

SMOKE = ["--config", "tasks/classification/configs/smoke.yaml"]
SPEED = Speed(130e9, 14e9, 7e9)
LOCAL = Variant("local", ())


def row(variant: Variant, measured: Measured | None = None) -> Row:
    estimate = estimate_variant(variant, SMOKE, load, SPEED)
    return make_row(variant.name, load([*SMOKE, *variant.overrides])[0], estimate, measured)


def measured(variant: Variant, cuda: CudaMemory | None = None) -> Row:
    footprint = estimate_variant(variant, SMOKE, load).footprint
    return row(variant, Measured(Memory(footprint, 900, 500, cuda), [0.2, 0.1, 0.4]))


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    write_json(
        tmp_path / "m.json", header("Memory", SMOKE, 1, "cpu"), [row(LOCAL).to_json(), measured(END_TO_END).to_json()]
    )
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["header"]["threads"] == 1
    promised = {"variant", "schedule", "auxiliary", "blocks", "activation_checkpointing", "peak_bytes"}
    promised |= {"by_category_bytes", "by_block_bytes", "step_seconds", "predicted_peak_bytes"}
    local, whole = content["rows"]
    assert promised <= local.keys() == whole.keys()
    assert (local["schedule"], local["auxiliary"], local["blocks"]) == ("sequential", "glcan", 4)
    assert (whole["schedule"], whole["auxiliary"], whole["blocks"]) == ("end_to_end", None, 1)
    assert local["by_category_bytes"].keys() == CATEGORIES.keys()
    assert sum(local["by_category_bytes"].values()) == local["peak_bytes"] == max(local["by_block_bytes"])
    assert (local["measured"], whole["measured"], whole["step_seconds"]) == (False, True, 0.2)
    assert whole["step_seconds_range"] == [0.1, 0.4]


def test_a_row_that_ran_out_of_memory_keeps_its_prediction_and_has_no_time() -> None:
    lost = row(END_TO_END, Measured(None, [], "CUDA out of memory"))
    assert not lost.measured
    assert lost.peak_bytes == lost.predicted_peak_bytes > 0
    assert lost.step_seconds is None
    overview = sheets([lost, measured(LOCAL)])[0]
    assert overview.rows[0][2] == "-", "not shown as measured"
    assert overview.rows[0][6] == "-"
    assert "end-to-end: CUDA out of memory" in notes([lost])
    assert "end-to-end did not fit: ratios are to its prediction" in notes([lost])


def test_an_allocators_figures_are_shown_apart() -> None:
    cuda = CudaMemory(allocated_bytes=3 * 2**20, reserved_bytes=4 * 2**20, retries=2, used_bytes=None)
    on_gpu = measured(LOCAL, cuda)
    assert on_gpu.peak_bytes == 3 * 2**20, "the allocator's peak, not the count of tensors"
    (sheet,) = [sheet for sheet in sheets([on_gpu]) if "allocator" in sheet.title]
    assert sheet.rows == [["local", "3.0", "4.0", "2", "-"]]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)], [0, 1]),
        ([(2.0, 1.0), (1.0, 1.0)], [1]),
        ([(1.0, 2.0), (1.0, 1.0)], [1]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


@pytest.mark.slow
def test_the_page_is_whole_in_itself(tmp_path: Path) -> None:
    rows = [measured(END_TO_END), measured(OFFLOADED), measured(LOCAL)]
    rows[2] = replace(rows[2], variant="<b>local</b>")
    path = tmp_path / "page.html"
    write_report(path, header("Memory", SMOKE, 1, "cpu"), rows)
    page = path.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is fetched"
    assert "<script" not in page
    assert "<b>local" not in page, "names are escaped"
    assert "&lt;b&gt;local" in page
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(pictures) == 4, "by category, memory against time, timeline, one by block"
    assert "bytes as on a GPU, not on the front" in pictures[1]
    assert "end-to-end + offload" in pictures[2]
    assert not any("http://" in re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons)", "", p) for p in pictures)
    for category in CATEGORIES:
        assert f">{category}<" in page
    write_report(path, {"title": "t"}, [replace(found, step_seconds=None) for found in rows])
    assert path.read_text().count("base64,") == 3, "no times, no chart of them"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/m.json: cannot be written: .*file"):
        write_json(tmp_path / "file/m.json", {}, [])


def test_neighbours_with_the_same_figures_share_a_line_and_empty_columns_go() -> None:
    sizes = [dict.fromkeys(CATEGORIES, 0) | {"activations": size * 2**20} for size in (3, 2, 2, 2, 1)]
    units = ["a", "b", "c", "d ... e", "f"]
    sheet = block_sheet(replace(row(LOCAL), units=units, by_block_by_category_bytes=sizes))
    assert sheet.columns == ["block", "all", "activations"]
    assert sheet.rows == [["0: a", "3.0", "3.0"], ["1-3: b ... e", "2.0", "2.0"], ["4: f", "1.0", "1.0"]]


@pytest.mark.slow
def test_a_plan_shows_all_ways_and_says_what_micro_batches_change() -> None:
    argv = [*SMOKE, "--model.name", "resnet14", "--data.batch", "64"]
    plan = make_plan(load(argv)[0], find_task("classification").build, 8 * 2**20, SPEED)
    assert plan.chosen.micro_batch < 64
    marks = [(line[0], line[-1]) for line in plan_sheet(plan).rows]
    assert [mark for _, mark in marks].count("chosen") == 1
    assert len(marks) >= 4, "both rivals, and both kinds of blocks, whether they fit or not"
    assert any("BatchNorm sees" in line for line in plan_notes(plan))
    whole = make_plan(load(argv)[0], find_task("classification").build, 2**30, SPEED)
    assert [line[-1] for line in plan_sheet(whole).rows] == ["chosen", "fits"]
    assert "nothing local" in plan_notes(whole)[0]
