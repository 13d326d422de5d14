"""Every way to train takes the same steps as its reference; figures by hand; failures are seen."""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import turns
from benchmarks.parallel import main
from benchmarks.rivals.balance import block_seconds, cut, unit_seconds
from benchmarks.rivals.entries import local_pipelines, one_process, rivals
from benchmarks.rivals.rival import Entry, Place, Rival
from benchmarks.rivals.stage import Stage
from benchmarks.turns import Taken, Turn, measure
from engine.learning.optimizer import build_optimizer
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from tasks import load

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--config", str(ROOT / "tasks/classification/configs/smoke.yaml"), "--data.batch", "16"]
WORDS += ["--train.device", "cpu", "--optimizer.lr", "0.05"]
EVEN = {4: [1.0] * 4}
STEPS = 4  # counted; 9 with those that are not
HERE = "tests.benchmarks.test_parallel"


def reference(parts: int) -> float:
    """The loss of the last step when gradients of so many micro-batches are summed up in one process."""
    config, task = load(WORDS)
    network, message = Stage(task.build_chain(initial=False)), task.example()
    optimizer = build_optimizer(config.optimizer, list(network.named_parameters()))
    for _ in range(turns.WARM_UP + STEPS + 2):
        losses = []
        for x, y in zip(message.x.chunk(parts), message.targets.chunk(parts), strict=True):
            losses.append(task.loss(network(x), y) / parts)
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(sum(losses).detach())


def run(entries: Sequence[Entry]) -> dict[str, Taken]:
    found = measure(entries, WORDS, load, steps=STEPS, timeout=300)
    assert {name: taken.failure for name, taken in found.items()} == dict.fromkeys(found, "")
    assert multiprocessing.active_children() == []
    return found


def check_losses(entries: Sequence[Entry], found: dict[str, Taken]) -> None:
    for entry in entries:
        parts = entry.micro_batches if entry.bounds else entry.ranks
        assert found[entry.name].losses[-1] == pytest.approx(reference(parts), rel=1e-3), entry.name


@pytest.mark.slow
def test_torch_takes_the_steps_it_should() -> None:
    """Pipelines accumulate micro-batches' gradients, replicas average theirs: each is its reference's step."""
    entries = [one_process()[0], *rivals(["pipelining", "replicas"], 2, EVEN)]
    assert len(entries) == 7
    found = run(entries)
    check_losses(entries, found)
    for taken in found.values():
        assert len(taken.seconds) == STEPS
        assert min(taken.seconds) > 0
        assert all(0 < busy <= 1.01 for busy in taken.busy)
        assert all(size > 2**20 for size in taken.peak_bytes)

    # Half-way through ResNet-8 a sample is 32 x 8 x 8 numbers forward, and as many back.
    for name, taken in found.items():
        if "torch GPipe" in name or "1F1B" in name or "ZB1P" in name:
            assert taken.sent_bytes == pytest.approx([16 * 16 * 16 * 16 * 4] * 2, rel=0.05), name
    # Two ranks in a ring: all gradients once.
    _, task = load(WORDS)
    weights = sum(parameter.nbytes for parameter in task.build_chain(initial=False).model.parameters())
    assert found["torch DDP"].sent_bytes == pytest.approx([weights] * 2, rel=0.05)
    assert found["one process: end-to-end"].sent_bytes == [0]


@pytest.mark.slow
def test_deepspeed_takes_the_steps_it_should() -> None:
    pytest.importorskip("deepspeed")
    entries = rivals(["deepspeed"], 2, EVEN)
    assert len(entries) == 4
    check_losses(entries, run(entries))


@pytest.mark.slow
def test_the_local_pipeline_is_the_local_run() -> None:
    entries = [one_process()[2], *local_pipelines(2, {1: [1.0] * 4})]
    found = run(entries)
    assert found[entries[0].name].losses == found[entries[1].name].losses
    # One message a step, one way: half the network's activations and what the bank holds.
    sent = found[entries[1].name].sent_bytes
    assert sent[0] == pytest.approx(16 * 16 * 16 * 16 * 4, rel=0.05)
    assert sent[1] < 1024


class Sender(Rival):
    """Rank 0 sends a million bytes a step."""

    def __init__(self, place: Place) -> None:
        self.rank = place.rank

    def step(self) -> Tensor:
        data = torch.zeros(1_000_000, dtype=torch.uint8)
        if self.rank == 0:
            dist.send(data, 1)
        else:
            dist.recv(data, 0)
        return torch.tensor(0.0)


class Dying(Sender):
    """Rank 1 is gone after a step."""

    steps = 0

    def step(self) -> Tensor:
        self.steps += 1
        if self.rank == 1 and self.steps == 2:
            os._exit(7)
        return super().step()


class Refusing(Sender):
    """Rank 0 cannot be built, rank 1 waits for it."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        if self.rank == 0:
            raise ValueError("no such\nthing")
        dist.barrier()


class Hanging(Sender):
    def step(self) -> Tensor:
        time.sleep(1000)
        return torch.tensor(0.0)


@pytest.mark.slow
def test_sent_bytes_by_hand_and_failures_are_told() -> None:
    entries = [Entry(maker.__name__, f"{HERE}:{maker.__name__}", 2) for maker in (Dying, Sender, Refusing)]
    start = time.monotonic()
    found = measure(entries, WORDS, load, steps=2, timeout=300)
    assert time.monotonic() - start < 200  # not a time-out
    assert found["Dying"].failure == "rank 1: its process was ended (exit code 7)"
    assert found["Refusing"].failure == "rank 0: no such thing"
    assert found["Sender"].failure == ""
    sent = found["Sender"].sent_bytes
    assert sent[0] == pytest.approx(1_000_000, rel=0.001)
    assert sent[1] < 1000
    assert multiprocessing.active_children() == []


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    team = turns._Team(Entry("hanging", f"{HERE}:Hanging"), WORDS, load, 1, tmp_path / "store", 300)
    try:
        assert team.ask("built?", 300) == [None]
        with pytest.raises(turns._Failure, match="no answer in 1 s"):
            team.ask(1, 1)
    finally:
        team.end()
    assert not any(process.is_alive() for process in team.processes)


def test_figures_by_hand() -> None:
    """Two ranks, a turn to warm up and one of two counted steps; the slower rank's ends count."""
    warm = Turn([1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [None, 9.0], 1)
    first = Turn([10.0, 11.0, 12.0, 13.0], [0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 1.0, 1.5], [None] * 4, 100)
    last = Turn([10.5, 12.0, 15.5, 16.0], [0.0, 2.0, 4.0, 4.0], [0.0, 2.0, 5.0, 5.0], [4.0, 3.0, 2.0, 1.0], 200)
    taken = Taken()
    turns._count(taken, [[warm, warm], [first, last]])
    assert taken.seconds == [1.5, 3.5]
    assert taken.cpu_seconds == [1.0, 2.0]
    assert taken.busy == [0.5, 1.0]
    assert taken.peak_bytes == [100, 200]
    assert taken.losses == [1.0]
    assert turns._sent([[warm, warm], [first, last]], [[100, None], [900, None]]) == [200, None]


@pytest.mark.slow
def test_stages_are_cut_by_time() -> None:
    assert cut([3.0, 1.0, 1.0, 1.0], 2) == (0, 1, 4)
    with pytest.raises(ValueError, match="--ranks: 3 stages asked for, there are 2 to cut into"):
        cut([1.0, 1.0], 3)
    seconds = unit_seconds(WORDS, load, [4], 1)
    assert list(seconds) == [4]
    assert len(seconds[4]) == len(block_seconds(WORDS, load, 1)) == 4
    assert min(seconds[4]) > 0


def test_a_stage_never_gives_a_view() -> None:
    """torch's zero-bubble schedules detach a stage's output in place."""
    example = Message({"x": torch.randn(2, 4)})
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.Conv2d(6, 2, 1))
    chain = Chain(
        model, [Unit("linear", model[:2]), Unit("conv", model[2])], Unit("head", torch.nn.Identity()), example
    )
    whole, first = Stage(chain), Stage(chain, 0, 1)
    output = first(example.x)
    output.detach_()
    assert torch.equal(Stage(chain, 1, 2)(output), whole(example.x))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--micro-batches", "3"], "--micro-batches: 3 does not divide data.batch, 16"),
        (["--micro-batches", "1"], "--micro-batches: 1 is too small; a pipeline of 2 ranks needs 2 or more"),
        (["--ranks", "1"], "--ranks: 1 is too small"),
        (["--local.precision", "bf16"], "local.precision"),
        (["--optimizer.clip_norm", "1"], "optimizer.clip_norm"),
    ],
)
def test_what_would_not_be_the_same_for_all_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*WORDS, *more])


@pytest.mark.slow
def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]
    main([*WORDS, *files, "--rivals", "replicas", "--micro-batches", "4", "--steps", "2"])
    content = json.loads((tmp_path / "p.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert len(rows) == 7
    assert content["header"]["batch"] == 16
    for row in rows.values():
        assert row["failure"] == ""
        assert row["samples_per_second"] == pytest.approx(16 / row["step_seconds"])
        assert len(row["peak_bytes_per_rank"]) == len(row["busy_per_rank"]) == row["ranks"]
    assert rows["one process: end-to-end"]["time_ratio"] == 1
    assert len(rows["local pipeline, 4 micro-batches"]["stages"]) == 2
    assert "torch FSDP2" in (tmp_path / "p.html").read_text()
