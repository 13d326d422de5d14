"""tools/memory.py and tools/plan.py as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import forked, run_ranks, values
from tests.tools.commands import ALONE, ROOT, SMOKE, assert_refused, call, run, typed


@pytest.mark.slow
def test_estimate_measure_and_compare(tmp_path: Path) -> None:
    files = ["--json", "m.json", "--html", "m.html"]
    for what, count in (("estimate", 4), ("measure", 4), ("compare", 6)):
        more = ["--auxiliaries", "glcan", "--blocks", "2", "99"] if what == "compare" else []
        words = [what, *SMOKE, *files, "--steps", "2", "--device", "cpu", *more]
        with forked():
            done = call(*words, tool="memory", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / "m.json").read_text())
        assert "<!doctype html>" in (tmp_path / "m.html").read_text()
        assert "end-to-end + recompute" in done.stdout
        rows = content["rows"]
        if what == "compare":
            assert [row["variant"] for row in rows[3:]] == [
                *("glcan K=2", "glcan K=4", "glcan K=2 + recompute", "glcan K=4 + recompute")
            ]
        else:
            assert len(rows) == count
        for row in rows:
            assert row["measured"] == (what != "estimate")
            assert row["predicted_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.01)
            assert row["step_seconds"] > 0
        (tmp_path / "m.html").unlink()


def test_an_estimate_needs_no_data(tmp_path: Path) -> None:
    """ImageNet and CIFAR-10 are not here; what they would need is known all the same."""
    config = ROOT / "tasks/classification/configs/cifar10_resnet32_k16_glcan.yaml"
    smaller = ["--model.name", "resnet8", "--local.blocks", "2"]
    done = call("estimate", "--config", str(config), *smaller, "--data.root", "nowhere", tool="memory", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_imagenet_in_two_gibibytes(tmp_path: Path) -> None:
    """ResNet-101, batch 256, 224 px, 4 blocks: all four rows, with what the whole process took."""
    config = ROOT / "tasks/classification/configs/imagenet_resnet101_k4_glcan.yaml"
    words = ["estimate", "--config", str(config), "--data.batch", "256", "--train.accumulate", "1", "--json", "m.json"]
    code = (
        "import runpy, sys; sys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "from engine.utilities.device import resident_bytes; print(resident_bytes()[1], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools/memory.py"), *words],
        cwd=tmp_path,
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 2 * 2**30
    local = json.loads((tmp_path / "m.json").read_text())["rows"][2]
    assert local["blocks"] == 4
    assert local["peak_bytes"] > 5 * 2**30


@pytest.mark.slow
def test_a_plan_trains_as_it_is(tmp_path: Path) -> None:
    with forked():
        done = call(*SMOKE, "--memory", "4.5MiB", "--json", "p.json", tool="plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Ways to train in 4.5 MiB" in done.stdout
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["budget_bytes"] == 4.5 * 2**20
    assert content["peak_bytes"] <= content["budget_bytes"]
    assert len(content["cut"]) == content["blocks"] - 1
    assert max(content["by_block_bytes"]) == content["peak_bytes"]
    command = done.stdout.strip().splitlines()[-1].split(": ", 1)[1].split()
    assert command[:4] == ["torchrun", "--standalone", "--nproc-per-node", "1"]
    trained = call(*command[5:], "--train.resume", "auto", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "runs/smoke_plan_4.5MiB/summary.json").read_text())
    assert (summary["steps"], summary["blocks"]) == (3, content["blocks"])
    before = (tmp_path / "smoke_plan_4.5MiB.yaml").read_text()
    again = call(*SMOKE, "--memory", "4.5MiB", "--data.batch", "30", tool="plan", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "wrote smoke_plan_4.5MiB-2.yaml" in again.stdout, "nothing is written over unasked"
    assert (tmp_path / "smoke_plan_4.5MiB.yaml").read_text() == before


BAD_INPUT = [
    ("plan", ["--memory", "4"], "--memory: '4' is not a size; write a number above 0 and one of KiB"),
    ("plan", ["--memory", "100KiB"], "--memory: 100.0 KiB is less than the 610.5 KiB that parameters, buffers and"),
    pytest.param(
        *("plan", ["--memory", "1MiB"], "--memory: no plan fits 1.0 MiB; the smallest achievable is"),
        marks=pytest.mark.slow,
    ),
    ("plan", ["--memory", "1GiB", "--out", "mine.yaml"], "--out: mine.yaml exists and is not a plan"),
    ("plan", ["--memory", "1GiB", "--model.name", "resnet9"], "model.name: resnet9 does not exist"),
    (
        "plan",
        ["--memory", "1GiB", "--out", "nowhere/p.yaml"],
        "nowhere/p.yaml: cannot be written: there is no folder",
    ),
    ("memory", ["estimate", "--local.blocks", "9"], "local.blocks: 9 blocks asked for, the network has 4 units"),
    ("memory", ["estimate", "--model.name", "timm:nothing"], "model.name: timm cannot build 'nothing'"),
    ("memory", ["measure", "--device", "cuda"], "train.device: cuda asked for, but torch"),
    ("memory", ["measure", "--device", "gpu"], "train.device: 'gpu' is none of auto, cpu, cuda, cuda:N"),
    ("memory", ["measure", "--snapshots", "s", "--device", "cpu"], "--snapshots: only CUDA's allocator keeps"),
    ("memory", ["compare", "--local.schedule", "end_to_end"], "end_to_end has no local rows to compare"),
    pytest.param("memory", ["compare", "--auxiliaries", "glcam"], "; did you mean 'glcan'?", marks=pytest.mark.slow),
    ("memory", ["compare", "--blocks", "0"], "--blocks: 0 is too small; the least is 1"),
    ("memory", ["measure", "--threads", "0"], "--threads: 0 is too small; the least is 1"),
    ("memory", ["measure", "--steps", "0", "--figure", "f.svg"], "--steps: 0 is too small; the least is 1"),
    ("memory", ["measure", "--steps", "many"], "--steps: 'many' is not a whole number; --help lists"),
    ("memory", ["measure", "--json", "nowhere/m.json"], "nowhere/m.json: cannot be written"),
    ("memory", ["measure", "--figure", "f.png"], "--figure: f.png does not end in .svg"),
    ("memory", ["estimate", "--blocks", "4"], "--blocks, --auxiliaries: only for compare; here --local.blocks"),
    ("memory", ["guess"], "what: 'guess' is none of estimate, measure, compare"),
    ("memory", ["estimat"], "what: 'estimat' is none of estimate, measure, compare; did you mean 'estimate'?"),
    ("memory", ["measure", "--step", "3"], "unknown option --step, did you mean --steps?"),
    ("plan", ["--memory", "-5GiB"], "--memory: '-5GiB' is not a size; write a number above 0"),
    ("plan", ["--memry", "5GiB"], "unknown option --memry, did you mean --memory?"),
    ("plan", ["--memory"], "--memory: no value given"),
    ("plan", [], "one of the arguments --memory --ranks is required"),
    ("plan", ["--ranks", "9"], "--ranks: 9 blocks for 9 stages, the network has 4 units; take fewer"),
    ("plan", ["--ranks", "1"], "--ranks: 1 is too small; the least is 2"),
    ("memory", ["estimate", "--local.blks", "3"], "unknown key 'local.blks', did you mean 'local.blocks'?"),
]


def given(room: Path, tool: str, words: list[str]) -> list[str]:
    """The command line, in a folder with a config of the user's."""
    (room / "mine.yaml").write_text("task: classification\n")
    return [words[0], *SMOKE, *words[1:]] if tool == "memory" else [*SMOKE, *words]


def assert_nothing_written(room: Path) -> None:
    assert (room / "mine.yaml").read_text() == "task: classification\n"
    assert [path.name for path in room.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(("tool", "words", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, words: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with forked():
        assert_refused(call(*given(tmp_path, tool, words), tool=tool, cwd=tmp_path), message)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("tool", "words", "message"), [BAD_INPUT[0], BAD_INPUT[6]], ids=["an option of plan's own", "a config's of memory"]
)
def test_bad_input_as_a_user_types_it(tmp_path: Path, tool: str, words: list[str], message: str) -> None:
    assert_refused(run(*given(tmp_path, tool, words), tool=tool, cwd=tmp_path), message)
    assert_nothing_written(tmp_path)


def test_a_plan_for_ranks_trains_as_it_is(tmp_path: Path) -> None:
    with forked():
        planned = call(*SMOKE, "--ranks", "2", "--out", "p.yaml", "--json", "p.json", tool="plan", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["stages"] == [0, 1]
    assert len(found["cut"]) == 1
    assert max(found["predicted_busy"]) == 1
    command = planned.stdout[planned.stdout.rindex("torchrun") :].split()
    assert command[1:5] == ["--standalone", "--nproc-per-node", "2", "tools/train.py"]
    values(run_ranks(2, typed, command[5:], tmp_path))
    summary = json.loads((tmp_path / "runs/p/summary.json").read_text())
    assert [rank["blocks"] for rank in summary["ranks"]] == [[0], [1]]
